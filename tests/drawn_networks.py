"""A user's own networks, for `--student drawn_networks:NAME`."""

from distpro.models import create_model


def of_any(num_classes, in_chans):
    """As timm calls them."""
    return create_model("wrn_10_1", num_classes, in_chans)


def of_width(width):
    return create_model(f"wrn_10_{width}", 10, 1)


made = create_model("wrn_10_1", 10, 1)


def of_5():
    """Five classes, one channel."""
    return create_model("wrn_10_1", 5, 1)
