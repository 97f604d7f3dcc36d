"""The phases of a run: each says what a step sees, what it minimizes, and how it is judged."""
