"""sfumato: 63 published methods that learn by hiding something, or that measure why training works.

Everything here is lazy: `import sfumato` is instant, and torch is imported when a part is first used.

>>> import sfumato
>>> sfumato.errors.nearest("colourmae", ["colormae", "cbsn"])
['colormae']
"""

import lazy_loader as _lazy

_attribute, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)


def __getattr__(name: str):
    if name == "__version__":  # importlib.metadata costs 40 ms: only who asks pays
        from importlib.metadata import version

        return version("sfumato")
    return _attribute(name)
