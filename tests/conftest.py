"""Settings of every tier: what has to be in the environment before torch is imported."""

import os

# The models of the tests are tiny and the tests run side by side: one thread each is fastest.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from stagetune_trainer.large_packages import hide_large_packages

# As in a trainer's own process: libraries would import what is hidden, used or not.
hide_large_packages()
