"""A real engine in a forked process, for tests that look inside. The thread that made it runs it, until its process ends."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.engine_proof import in_fork


def beside_engine(make: Callable[[], Any], scenario: Callable[[Any], Any]) -> Any:
    """What `scenario(engine)` returns, which JSON can hold; {"error": ...} where it raises. `make` makes the engine. The
    environment is that of the fixture `engine_environment`."""

    def work(result: Path) -> None:
        engine = make()

        def run() -> None:
            try:
                answer = scenario(engine)
            except BaseException as error:
                answer = {"error": repr(error)}
            result.write_text(json.dumps(answer))
            os._exit(0)

        threading.Thread(target=run).start()
        engine.run()

    return in_fork(work)
