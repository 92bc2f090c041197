"""Pure parts of pruning and sparse training: what is kept together, how much of it, and how a loss sees the masks."""

from flax_surgery_hooks.sparsity.distributions import erk as erk
from flax_surgery_hooks.sparsity.distributions import uniform as uniform
from flax_surgery_hooks.sparsity.straight_through import apply_masks as apply_masks
from flax_surgery_hooks.sparsity.straight_through import masks_of as masks_of
from flax_surgery_hooks.sparsity.straight_through import sr_ste as sr_ste
from flax_surgery_hooks.sparsity.straight_through import ste as ste
from flax_surgery_hooks.sparsity.structures import Structure as Structure
from flax_surgery_hooks.top_k import top_k_mask as top_k_mask
from flax_surgery_hooks.top_k import top_k_masks as top_k_masks
from flax_surgery_hooks.top_k import top_k_masks_each as top_k_masks_each
