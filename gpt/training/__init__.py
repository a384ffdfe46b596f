"""The night: the loop with its optimizer, schedule and checkpoints."""
