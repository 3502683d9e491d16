"""Hold back the signals of a preemption, then become the wanted program: `python -I -S hold_signals.py PROGRAM ...`.

A mask survives exec, and so does a signal that is pending: it is delivered when the stop token of the program has its
handlers in place (runtime/stop.py), so one that comes while torch is imported ends in a saved state and not in a dead
process. SIGCONT, which Slurm sends along, is held back too until submitit's handler for it is gone (slurm/task.py).
"""

import os
import signal
import sys

HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    os.execvp(sys.argv[1], sys.argv[1:])
