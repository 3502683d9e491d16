"""Workers of the stages after training: sample, evaluate, report."""
