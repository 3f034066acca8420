"""What registering does to the process that loads the plugin."""

from __future__ import annotations

import gc

from foldserve.server.engine import plugin


def test_garbage_is_looked_for_again_once_a_server_s_process_has_imported() -> None:
    gc.unfreeze()
    gc.disable()
    try:
        plugin.register()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.enable()
