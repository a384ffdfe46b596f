"""How many parameters a model has, by group, without building it."""

from dataclasses import asdict, dataclass

from gpt.config.schema import ModelSection


@dataclass(frozen=True)
class Parameters:
    """Counts of trainable parameters by disjoint groups. A tied head counts 0."""

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
        """Parameters that Muon updates, if it is chosen."""
        return self.attention + self.mlp

    @property
    def in_blocks(self) -> int:
        """Parameters of all blocks, including the final norm."""
        return self.block_matrices + self.vectors

    def groups(self) -> dict[str, int]:
        return {name: count for name, count in asdict(self).items() if name != "tied"}

    def optimizer_states(self, optimizer: str) -> int:
        """Numbers that the optimizer keeps: AdamW two per parameter, Muon one."""
        return 2 * self.total - (self.block_matrices if optimizer == "muon" else 0)


def count_parameters(model: ModelSection) -> Parameters:
    """Count parameters; equals `GPT.num_parameters` of the built model."""
    width, layers, gpt2 = model.n_embd, model.n_layer, model.architecture == "gpt2"
    embedding = model.vocab_size * width
    norms = 2 * layers + 1
    # One per norm; per block 3 + 1 + 4 + 1 widths in the linear layers.
    biases = norms + 9 * layers if model.bias else 0
    return Parameters(
        token_embedding=embedding,
        position_embedding=model.block_size * width if gpt2 else 0,
        attention=4 * width**2 * layers,
        mlp=8 * width**2 * layers,
        vectors=(norms + biases) * width if gpt2 else 0,
        head=0 if gpt2 else embedding,
        tied=gpt2,
    )
