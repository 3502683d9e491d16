"""The training loop, engines, optimizers, EMA, schedules and the checkpoint chain; methods are known by protocol only."""
