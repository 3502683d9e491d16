"""Training: the loop, engines, optimizers, EMA, schedules, checkpoint chain. It knows methods by their protocol."""
