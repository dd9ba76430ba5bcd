"""Which layers train next: exact sampling schemes (numpy)."""

from lisa_train.methods.lisa.samplers.schemes import SAMPLERS as SAMPLERS
from lisa_train.methods.lisa.samplers.schemes import BalancedSampler as BalancedSampler
from lisa_train.methods.lisa.samplers.schemes import Sampler as Sampler
from lisa_train.methods.lisa.samplers.schemes import SystematicSampler as SystematicSampler
from lisa_train.methods.lisa.samplers.schemes import make_sampler as make_sampler
from lisa_train.methods.lisa.samplers.schemes import never_drawn as never_drawn
from lisa_train.methods.lisa.samplers.schemes import resolve as resolve
from lisa_train.methods.lisa.samplers.schemes import seed_word as seed_word
