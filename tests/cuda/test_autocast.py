"""Which operations CUDA's autocast runs in float32: only those that are meant to be."""

import pytest
import torch
from networks import model_section
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt.hardware.device import autocast
from gpt.model.architectures import build_model
from gpt.model.loss import linear_cross_entropy

pytestmark = pytest.mark.cards("rtx4070", "t4")

BATCH, TIME, WIDTH, VOCABULARY = 8, 128, 32, 512
RESIDUAL = {"embedding", "native_dropout", "native_layer_norm", "add"}
"""GPT-2's residual stream is float32, as nanoGPT's: what adds to it and what normalizes it."""
MEANT = {
    "gpt2": RESIDUAL | {"_to_copy", "native_layer_norm_backward", "native_dropout_backward"},
    # The gradient of the embedding is summed in float32.
    "nanochat": {"embedding", "_to_copy"},
}


class Float32Recorder(TorchDispatchMode):
    """Count the float32 results that are as large as the hidden states or larger."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                name = function.overloadpacket.__name__
                if tensor.numel() >= BATCH * TIME * WIDTH and "view" not in name:
                    self.counts[name] = self.counts.get(name, 0) + 1
        return result


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
def test_network_computes_in_the_lower_precision(architecture, dtype):
    section = model_section(architecture, n_embd=WIDTH, block_size=TIME, dropout=0.1)
    section = section.model_copy(update={"vocab_size": VOCABULARY})
    device = torch.device("cuda")
    model = build_model(section).to(device)
    ids = torch.zeros(BATCH, TIME, dtype=torch.int64, device=device)
    with Float32Recorder() as recorder, autocast(device, dtype):
        hidden = model(ids)
    with autocast(device, dtype):
        loss = linear_cross_entropy(hidden, model.head, ids, model.logit_softcap)
    with recorder:
        loss.backward()
    assert set(recorder.counts) <= MEANT[architecture], recorder.counts
    if architecture == "nanochat":  # the embedding, and its gradient
        assert recorder.counts == {"embedding": 1, "_to_copy": 1}
