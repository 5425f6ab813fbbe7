"""`torchrun --nproc-per-node N -m worldenv ...`: worldenv-train, on several ranks."""

from worldenv import entry

if __name__ == "__main__":
    entry.train()
