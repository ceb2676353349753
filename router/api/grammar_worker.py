"""python -m router.api.grammar_worker: compiles grammars for the HTTP front, in a process that may be killed.

Reads one JSON object per line, {"kind", "text", "lenient"}, and answers each with one: {"error": null or the reason}.
Its memory is bounded by the operating system, its time by whoever waits for the answer.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from experts.model_config import ModelConfig
from router.errors import GrammarFailed
from router.grammar import Grammar
from router.llguidance_grammars import LlguidanceCompiler

# Of address space, beyond what the process has when it starts; the library's own bounds end well before.
MAX_MEMORY_BYTES = 1 << 30
# A router compiles beside its requests: what takes longer here would stall a core of it for as long.
MAX_COMPILE_S = 0.5


def main() -> int:
    folder = Path(sys.argv[1])
    config = ModelConfig.from_folder(folder)
    compiler = LlguidanceCompiler.from_checkpoint(folder, config.vocab_size, config.eos_token_ids)
    if compiler is None:
        return 1
    _bound_memory()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"error": _check(compiler, request)}), flush=True)
    return 0


def _check(compiler: LlguidanceCompiler, request: dict[str, str]) -> str | None:
    started_s = time.process_time()
    try:
        compiler.compile(Grammar(request["kind"], request["text"], bool(request["lenient"])))  # pyright: ignore[reportArgumentType]
    except GrammarFailed as error:
        return str(error)
    except MemoryError:
        return "it is too large"
    return "it is too complex" if time.process_time() - started_s > MAX_COMPILE_S else None


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    limit = pages * resource.getpagesize() + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    sys.exit(main())
