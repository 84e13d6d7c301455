"""Triton's interpreter in half the time, and fewer programs for it."""

import dataclasses


def make_fast():
    """The interpreter computes what it did: two things that it does beside that are left out.

    Both reach into what Triton keeps private: a version with other names is left as it is, and as slow.
    """
    try:
        from triton.runtime import interpreter

        patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
        builder = interpreter.interpreter_builder
        # A check of each sum and product of integers in a dozen operations, whose outcome it looks at in debug mode only.
        if not builder.options.debug:
            builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        return

    patched = set()

    def launch_that_patches_once(self, *args, **kwargs):
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    def patch_once(fn):
        """A launch replaces functions of triton.language by its own. So does each call of a device function within it (tl.sum and
        tl.zeros are some), anew, though the names in its module have been replaced already."""
        module = id(fn.__globals__)
        if module in patched:
            return None  # only a launch, which is the first, uses what is returned
        patched.add(module)
        return patch(fn)

    interpreter.GridExecutor.__call__ = launch_that_patches_once
    interpreter._patch_lang = patch_once


def take_ranks(count, setattr=setattr):
    """Programs of `decode` that compute h of fp32 or of one token take so many ranks."""
    from adafuse.ops.decode import Tile

    default = Tile.default
    setattr(Tile, "default", lambda *shape: dataclasses.replace(default(*shape), block_j=count))
