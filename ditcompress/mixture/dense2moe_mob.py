"""dense2moe-mob: dense2moe with a Mixture of Blocks (arXiv 2510.09094, section 3.3): `--blocks-active`, 0.6 by default.

Groups of blocks with a router each (mixture/_blocks.py). Training has the paper's three stages (mixture/_stages.py):
shared experts, routed ones, then everything with blocks skipped, where the outputs of the groups, not of the blocks
inside them, follow the teacher's.
"""

from __future__ import annotations

from ._stages import SHARES
from .dense2moe import NEEDS as NEEDS
from .dense2moe import Params as Params
from .dense2moe import split as split

BLOCKS_ACTIVE = 0.6
STAGES = SHARES
