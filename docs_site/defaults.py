"""Extension of Griffe: the default of a configuration value is its first argument, `value(64, COUNT)` is 64."""

import griffe


class Defaults(griffe.Extension):
    """Shows the defaults of fields that `sisma_jax.schema.value` makes."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        """Replaces the call that makes a field by its default."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "value":
            attr.value = call.arguments[0]
