"""Checks that several policies share."""

from __future__ import annotations

ON_CONTINUE = ("warn", "keep", "error")


def check_layer(layer: int, minimum: int = 0, why: str = "") -> None:
    """Raise unless ``layer`` is an int >= ``minimum``."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer must be an int (0-based decoder layer), got {layer!r}")
    if layer < minimum:
        raise ValueError(f"layer={layer}: {why or f'decoder layers count from {minimum}'}")


def check_count(value: int, name: str, least: int, most: int) -> None:
    """Raise unless ``value`` is an int in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name}={value}: choose {least}…{most}")


def check_depth(layer: int, num_hidden_layers: int, minimum: int = 0) -> None:
    """Raise unless decoder layer ``layer`` exists. minimum: the first layer that the policy may name."""
    if layer >= num_hidden_layers:
        last = num_hidden_layers - 1
        choose = f"choose {minimum}…{last}" if last > minimum else f"choose {minimum}"
        raise ValueError(f"layer={layer}, but the model has {num_hidden_layers} decoder layers: {choose}")


def check_number(value: float, name: str) -> float:
    """``value``, a finite int or float (no bool), as a float; raise if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not -1e300 < value < 1e300:
        raise ValueError(f"{name}={value!r} must be a finite number")
    return float(value)


def check_part(value: float, name: str, what: str) -> None:
    """Raise unless ``value`` is a number in (0, 1]. what: it does, for the message."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1], got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value}: {what} and lies in (0, 1]")


def check_tower_layer(layer: int | float, name: str) -> None:
    """Raise unless ``layer`` names a layer of the vision tower: an int, or a float as a share of its depth."""
    value = check_number(layer, name)
    if isinstance(layer, float) and not 0.001 <= value <= 1:
        raise ValueError(f"{name}={layer}: a float is a share of the tower's depth, 0.001…1.0")
    if isinstance(layer, int) and not -999 <= layer <= 999:
        raise ValueError(f"{name}={layer}: an int counts the tower's layers, from the last one if below 0")


def check_on_continue(value: str) -> None:
    """Raise unless ``value`` says what to do when a later turn meets tokens kept for an earlier question."""
    if value not in ON_CONTINUE:
        raise ValueError(f"on_continue={value!r}: choose one of {', '.join(ON_CONTINUE)}")


def check_placement(placement: str) -> None:
    """Raise unless ``placement`` is one of the two ways in which tokens can lie afterwards."""
    if placement not in ("true", "official"):
        raise ValueError(f"placement={placement!r}: choose 'true' or 'official'")


def check_positions(positions: str) -> None:
    """Raise unless ``positions`` says what becomes of the positions of tokens that stay after a cut."""
    if positions not in ("keep", "reindex"):
        raise ValueError(f"positions={positions!r}: choose 'keep' or 'reindex'")


def check_sharing(share: str) -> None:
    """Raise unless ``share`` says among whom a budget is divided: all tokens of the row, or image by image."""
    if share not in ("row", "image"):
        raise ValueError(f"share={share!r}: choose 'row' or 'image'")


def check_before(before_decoder: bool, layer: int) -> None:
    """Raise unless ``before_decoder`` is a bool, and ``layer`` is 0 where it is true."""
    if not isinstance(before_decoder, bool):
        raise TypeError(f"before_decoder must be true or false, got {before_decoder!r}")
    if before_decoder and layer:
        raise ValueError(
            f"before_decoder=true reduces images before layer 0, so it cannot act at layer={layer}: name one"
        )
