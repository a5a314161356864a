"""The training loop: its steps and their batches, what is scored in between, and what an interrupted training goes on from."""
