"""The architectures that `model.architecture` names. To add one, write its module beside `gpt2.py`
and enter its class here.
"""

from gpt.config.schema import ModelSection
from gpt.model.base import GPT
from gpt.model.gpt2 import GPT2
from gpt.model.nanochat import NanoChat

ARCHITECTURES: dict[str, type[GPT]] = {"gpt2": GPT2, "nanochat": NanoChat}


def build_model(config: ModelSection) -> GPT:
    """Build the network of a config's `[model]` section with freshly drawn weights.

    It is created on torch's default device in float32, from torch's global random state. Under
    `torch.device("meta")` it has shapes but no weights. Called on ids (batch, time), it returns
    hidden states (batch, time, n_embd); `gpt.model.loss` turns those into losses or logits.
    """
    model = ARCHITECTURES[config.architecture](config)
    model.init_weights()
    return model
