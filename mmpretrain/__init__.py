"""Multimodal image-text pretraining: objectives that compose, over captioned and uncaptioned shards."""

import os as _os
import sys as _sys

__version__ = "0.1.0"


def _refuse_a_second_distribution() -> None:
    """Raise ImportError where OpenMMLab's mmpretrain, whose packages have the same import name, is installed too.

    The names of distributions in the folders of installed packages suffice: their metadata takes longer to read than
    the rest of this package takes to import.
    """
    here = _os.path.dirname(_os.path.dirname(__file__))
    installed = [folder for folder in _sys.path if folder.endswith(("site-packages", "dist-packages"))]
    for folder in dict.fromkeys([here, *installed]):
        # The import system keeps the listing of a folder that it has searched; listing it again is the slowest part here.
        names = getattr(_sys.path_importer_cache.get(folder), "_path_cache", None)
        try:
            names = names or _os.listdir(folder)
        except OSError:
            continue
        for name in names:
            # `mmpretrain-1.2.0.dist-info`, `mmpretrain-1.2.0-py3.11.egg-info`, `mmpretrain.egg-link`; this one's begin with mmpretrain_clip
            if name.startswith(("mmpretrain-", "mmpretrain.")) and name.endswith((".dist-info", ".egg-info", ".egg-link")):
                raise ImportError(
                    f"two distributions share the import name mmpretrain: mmpretrain-clip, in {here}, and OpenMMLab's mmpretrain, "
                    f"installed as {_os.path.join(folder, name)}. One environment holds one of them, or files of both would be mixed: "
                    "run `pip uninstall mmpretrain` and then install mmpretrain-clip again, or give each an environment of its own."
                )


_refuse_a_second_distribution()
