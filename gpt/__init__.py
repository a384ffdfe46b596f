"""The library of overnight: text to tokens to a trained, evaluated GPT. No prefect, no mlflow.

Reading order: `config` (what can be decided), `errors`, `artifacts` (what passes between stages);
`data.tokenizer`, `data.corpus`, `data.shards`, `data.batches` (text to batches);
`model.transformer`, `model.loss`, `model.generation` (the network);
`training.loop` with `optimizer`, `schedule`, `checkpoint` (the night);
`evaluation.heldout` (the morning).
"""
