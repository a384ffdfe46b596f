"""How many parameters a model has, by group, without building it."""

from __future__ import annotations

from dataclasses import dataclass

from gpt.config.schema import ModelSection


@dataclass(frozen=True)
class Parameters:
    """Trainable numbers. Groups are disjoint; a tied head counts nothing."""

    token_embedding: int
    position_embedding: int
    attention: int
    mlp: int
    vectors: int
    """Weights of the norms, and biases."""
    head: int
    tied: bool

    @property
    def total(self) -> int:
        return sum(self.groups().values())

    @property
    def block_matrices(self) -> int:
        """What Muon updates where it is chosen."""
        return self.attention + self.mlp

    @property
    def in_blocks(self) -> int:
        """Of all blocks, the last norm among them."""
        return self.attention + self.mlp + self.vectors

    def groups(self) -> dict[str, int]:
        return {
            "token_embedding": self.token_embedding,
            "position_embedding": self.position_embedding,
            "attention": self.attention,
            "mlp": self.mlp,
            "vectors": self.vectors,
            "head": self.head,
        }


def count_parameters(model: ModelSection) -> Parameters:
    """Equal to `GPT.num_parameters` of the built model, to the unit."""
    width, layers = model.n_embd, model.n_layer
    embedding = model.vocab_size * width
    tied = model.architecture == "gpt2"
    return Parameters(
        token_embedding=embedding,
        position_embedding=model.block_size * width if tied else 0,
        attention=4 * width**2 * layers,
        mlp=8 * width**2 * layers,
        vectors=_gpt2_vectors(model) if tied else 0,
        head=0 if tied else embedding,
        tied=tied,
    )


def _gpt2_vectors(model: ModelSection) -> int:
    """Two norms a block and one at the end; with biases theirs, and 3 + 1 + 4 + 1 widths of the
    linear layers of a block."""
    norms = 2 * model.n_layer + 1
    biases = norms + 9 * model.n_layer if model.bias else 0
    return (norms + biases) * model.n_embd
