"""One paper, one file. ``methods[name]`` is the class; ``secateur methods`` lists them all."""

from secateur.methods.base import Decision, Described, Method, Need
from secateur.registry import Registry

methods: Registry[type[Described]] = Registry(
    "method",
    {
        "magnitude": "secateur.methods.magnitude:Magnitude",
        "wanda": "secateur.methods.wanda:Wanda",
        "gblm": "secateur.methods.gblm:GBLM",
        "gradient": "secateur.methods.gblm:Gradient",
        "ria": "secateur.methods.ria:RIA",
        "sparsegpt": "secateur.methods.sparsegpt:SparseGPT",
        "random": "secateur.methods.magnitude:Random",
        "maskllm": "secateur.methods.maskllm:MaskLLM",
        "slimgpt": "secateur.methods.slimgpt:SlimGPT",
        "llm-pruner": "secateur.methods.llm_pruner:LLMPruner",
        "deprune": "secateur.methods.deprune:DEPrune",
        "heads": "secateur.methods.heads:Heads",
        "unit-magnitude": "secateur.methods.unit_baselines:UnitMagnitude",
        "unit-random": "secateur.methods.unit_baselines:UnitRandom",
        "channel-l1": "secateur.methods.channel_norms:ChannelL1",
        "channel-l2": "secateur.methods.channel_norms:ChannelL2",
        "channel-fpgm": "secateur.methods.channel_norms:ChannelFPGM",
        "channel-random": "secateur.methods.channel_norms:ChannelRandom",
        "s2hpruner": "secateur.methods.s2hpruner:S2HPruner",
    },
    group="secateur.methods",
)

__all__ = ["Decision", "Described", "Method", "Need", "methods"]
