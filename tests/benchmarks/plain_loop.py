"""The baseline of the training benchmark: a plain GPT-2 and its loop, as in nanoGPT.

Learned positions, LayerNorm, GELU, tied head, whole logits through `F.cross_entropy`, AdamW with
warm-up and cosine, gradient accumulation, clipping; compiled on CUDA. Written for this benchmark
after the description of github.com/karpathy/nanoGPT. It shares the shards with this repository, but
no model, loss, optimizer or schedule.
"""

import math
import time

import torch
from torch import nn
from torch.nn import functional as F

from gpt.data.loader import SequenceDataset, TrainingLoader, iterate_validation_batches


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.ln_2 = nn.LayerNorm(width, bias=False)
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.gelu = nn.GELU()
        self.fc_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = self.qkv(self.ln_1(x)).split(width, dim=2)
        q, k, v = (
            t.view(batch, time, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(batch, time, width))
        return x + self.fc_proj(self.gelu(self.fc(self.ln_2(x))))


class PlainGPT(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.tokens = nn.Embedding(model.vocab_size, model.n_embd)
        self.positions = nn.Embedding(model.block_size, model.n_embd)
        self.blocks = nn.ModuleList(Block(model.n_embd, model.n_head) for _ in range(model.n_layer))
        self.ln_f = nn.LayerNorm(model.n_embd, bias=False)
        self.head = nn.Linear(model.n_embd, model.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                small = name.endswith("proj.weight")
                std = 0.02 / math.sqrt(2 * model.n_layer) if small else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, inputs, targets):
        x = self.tokens(inputs) + self.positions(
            torch.arange(inputs.shape[1], device=inputs.device)
        )
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def learning_rate(step, peak, warmup, steps):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (steps - warmup)
    return 0.1 * peak + 0.9 * peak * 0.5 * (1 + math.cos(math.pi * progress))


def train_plain(config, dataset, peak_learning_rate, warmup):
    """Yield (step, training seconds so far, training loss, validation loss or None).

    The network is compiled before the first step, as ours is in the trial of its micro-batch.
    """
    training, model_config = config.training, config.model
    device = torch.device(config.hardware.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(training.seed)
    model = PlainGPT(model_config).to(device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak_learning_rate,
        betas=(0.9, 0.95),
        fused=on_gpu,
    )
    network = torch.compile(model) if on_gpu and training.compile else model
    train_set = SequenceDataset(dataset, dataset.train, model_config.block_size)
    held_out = SequenceDataset(dataset, dataset.validation, model_config.block_size)
    batches = TrainingLoader(train_set, training.seed)

    @torch.no_grad()
    def validate():
        total, tokens = 0.0, 0
        evaluation = config.evaluation
        for inputs, targets in iterate_validation_batches(
            held_out, evaluation.tokens, evaluation.batch_size
        ):
            with autocast:
                loss = model(inputs.to(device), targets.to(device))
            total += loss.item() * targets.numel()
            tokens += targets.numel()
        return total / tokens

    if on_gpu:
        ids = torch.zeros(training.batch_size, model_config.block_size, dtype=torch.int64)
        with autocast:
            network(ids.to(device), ids.to(device)).backward()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    seconds = 0.0
    for step in range(training.max_steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak_learning_rate, warmup, training.max_steps)
        total = 0.0
        for _ in range(training.grad_acc):
            inputs, targets = batches.next_batch(training.batch_size)
            if on_gpu:
                inputs = inputs.pin_memory().to(device, non_blocking=True)
                targets = targets.pin_memory().to(device, non_blocking=True)
            with autocast:
                loss = network(inputs, targets) / training.grad_acc
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = float(total)
        seconds += time.perf_counter() - began
        done = step + 1
        due = done == training.max_steps or done % config.evaluation.interval == 0
        yield done, seconds, total, validate() if due else None
