"""The config of a whole run that trains in a second, as TOML."""

TINY_CONFIG = """
[run]
name = "tiny"
root = "{root}"

[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 32

[data]
source = "{source}"
validation_fraction = 0.2

[training]
batch_size = 2
grad_acc = 2
max_steps = 12
dtype = "float32"
compile = false
checkpoint_interval = 5
log_interval = 4

[evaluation]
interval = 6
tokens = 256
prompts = ["The"]
sample_tokens = 4
"""
