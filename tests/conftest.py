# SPDX-License-Identifier: Apache-2.0
"""Tests run offline and from the repository's root, on tiny pipelines that they make on disk."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}
sys.path.insert(0, str(ROOT))
