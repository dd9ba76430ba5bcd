"""How a model is trained: a file or folder per method, and `METHODS`, which lists them."""

from lisa_train.methods import full as full
from lisa_train.methods import lisa as lisa
from lisa_train.methods import lora as lora
from lisa_train.methods import peft as peft
from lisa_train.methods import select as select
from lisa_train.methods.registry import METHODS as METHODS
from lisa_train.methods.registry import Method as Method
from lisa_train.methods.registry import register as register
