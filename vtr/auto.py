"""``import vtr.auto``: from here on every model of a family vtr knows is patched as soon as it is built or loaded.

For code that is not yours to edit. ``VTR_POLICY`` in the environment is the policy of calls that name none::

    VTR_POLICY="gsearch:llava-1.5-7b" python -m vtr.auto their_script.py --their-option 1

What happens to which model is said in :mod:`vtr.autopatch`. :func:`disable` undoes everything.
"""

from vtr.autopatch import VARIABLE, disable, enable, enable_from_environment, history, patched

__all__ = ["VARIABLE", "disable", "enable", "history", "patched"]

if __name__ == "__main__":
    from vtr.commands.auto import main

    main()
else:
    enable_from_environment()
