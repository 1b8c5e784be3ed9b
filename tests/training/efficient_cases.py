"""Small models in exact float64, and windows, for the tests of EfficientLLM."""

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from secateur.data.windows import Windows
from secateur.models.tiny import tiny_model


class ExactRMSNorm(LlamaRMSNorm):
    """Llama's norm without the detour over float32."""

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def exact_llama(**changes):
    """A two-block Llama that computes in float64 throughout."""
    model = tiny_model("llama", **{"num_key_value_heads": 4, **changes}).double()
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = ExactRMSNorm
    return model


def exact_loss(model, batch):
    """Next-token cross-entropy in the model's own precision."""
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten())


def windows(count=40, length=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return Windows(torch.randint(4, 260, (count, length), generator=generator))


def parameters(model):
    return sum(p.numel() for p in model.parameters())
