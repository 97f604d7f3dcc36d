"""vLLM policy: settings, engine, models, hidden-state capture and transport."""
