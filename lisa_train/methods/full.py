"""Full fine-tuning: every weight trains."""

from lisa_train.methods.registry import Method, register


@register
class Full(Method):
    """Train every weight of the model, as it was loaded."""

    name = "full"
    help = "trains every weight"
    changes_model = False
