"""The Flower ServerApp: rounds, strategies, evaluation and checkpoints, for any model."""
