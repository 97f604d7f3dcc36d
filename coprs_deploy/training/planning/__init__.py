"""What is known before the first step: problems of a run, and estimates of memory and time."""
