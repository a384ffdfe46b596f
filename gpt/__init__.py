"""The library of overnight: text to tokens to a trained, evaluated GPT. Knows nothing of the
workflow engine and the tracking server around it.

Reading order: `config` (what can be decided), `errors`, `artifacts` (what passes between stages);
`data.tokenizer`, `data.corpus`, `data.shards`, `data.batches` (text to batches);
`model.transformer`, `model.loss`, `model.generation` (the network);
`training.loop` with `optimizer`, `schedule`, `checkpoint` (the night);
`evaluation.heldout`, `evaluation.benchmarks` (the morning). Beside them: `preflight` (what a run
will need, before it is started) and `exchange` (other people's formats).
"""
