"""The library of overnight: from text to a trained and evaluated GPT. It imports neither Prefect
nor MLflow.

Reading order: `config.schema` (what can be set), `errors`, `artifacts` (what passes between
stages); `data.tokenize.pipeline`, `data.shards`, `data.loader` (from text to batches);
`model.gpt2`, `model.nanochat`, `model.loss`, `model.generate` (the networks); `training.loop` with
`optimizer`, `schedule` and `checkpoint`; `evaluation.heldout`, `evaluation.benchmarks`. Beside
them: `preflight` (what a run needs) and `exchange` (formats of other libraries).
"""
