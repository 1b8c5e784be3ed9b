"""Writing pruned models: Hugging Face, bitmask, 2:4, GGUF; each re-opened and verified."""

from secateur.export.bitmask import export_bitmask, load_bitmask
from secateur.export.gguf import export_gguf
from secateur.export.huggingface import reference_logits, verify_folder
from secateur.export.loading import load_pruned
from secateur.export.pruned import save_pruned
from secateur.export.semi_structured import measure_semi_structured, to_semi_structured

__all__ = [
    "export_bitmask",
    "export_gguf",
    "load_bitmask",
    "load_pruned",
    "measure_semi_structured",
    "reference_logits",
    "save_pruned",
    "to_semi_structured",
    "verify_folder",
]
