"""Run vLLM's asynchronous engine beside this process: ``engine: vllm``. It is imported when it is started."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

from mllm.engines.base import Engine, EngineError, Request, Source
from mllm.engines.options import check_options, rank_for, sampling_of
from mllm.engines.probe import check_embeddings
from mllm.errors import MLLMError, first_line
from mllm.lms.decoding import Decoding


class InProcess(Engine):
    """vLLM's ``AsyncLLM``, whose layers are in a process that it starts; one that ended is started again.

    Args:
        options: of vLLM's ``AsyncEngineArgs`` (``tensor_parallel_size``, ``gpu_memory_utilization``,
            ``max_model_len``, ...); the language model's own are set already.
    """

    label = "vllm"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = options
        self._llm: Any = None  # vLLM's AsyncLLM, while it runs
        self._source: Source | None = None
        self._numbers = itertools.count()
        self._starting = asyncio.Lock()
        atexit.register(self.close)  # its process would outlive this one, and write of its loss

    async def start(self, source: Source) -> int | None:
        """Load the layers; see `mllm.engines.base.Engine.start`."""
        self._source = source
        llm = await self._running()
        await check_embeddings(self, source)
        return int(llm.model_config.max_model_len)

    def check(self, decoding: Decoding) -> None:
        """Refuse options that vLLM does not have."""
        check_options(decoding)

    async def stream(self, request: Request) -> AsyncIterator[list[int]]:
        """Yield an answer's new ids as they are generated."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        llm = await self._running()
        options = sampling_of(request.decoding, request.ends)
        parameters = SamplingParams(**options, output_kind=RequestOutputKind.DELTA)
        name = "prompt_token_ids" if isinstance(request.prompt, list) else "prompt_embeds"
        number = f"mllm-{next(self._numbers)}"
        outputs = llm.generate({name: request.prompt}, parameters, number, lora_request=self._lora())
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield list(output.outputs[0].token_ids)
        except EngineDeadError:
            self._stop(llm)
            raise EngineError("The engine vllm ended. It is started again for the next request.") from None

    def close(self) -> None:
        """End vLLM's process, if it runs."""

        async def end() -> None:
            if self._llm is not None:
                self._stop(self._llm)

        self.run(end())

    async def _running(self) -> Any:
        """Return the engine, which is started if it is not running."""
        async with self._starting:
            if self._llm is None:
                assert self._source is not None
                self._llm = self._started(self._source)
            return self._llm

    def _stop(self, llm: Any) -> None:
        """Forget an engine that ended."""
        if self._llm is llm:
            self._llm = None
            llm.shutdown()

    def _started(self, source: Source) -> Any:
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise MLLMError(
                f"The engine vllm needs {error.name}, which is not installed: pip install 'mllm-assembly[vllm]', in an "
                "environment of its own, or give the URL of a server of vLLM."
            ) from None
        lora = {
            "enable_lora": True,
            "max_lora_rank": rank_for(source.rank),
            "lora_target_modules": list(source.targets),  # else the embedding table, too, is given ids alone
        }
        options = {
            "model": source.folder,
            "dtype": source.dtype,
            "trust_remote_code": source.trust_remote_code,
            "enable_prompt_embeds": True,
            "enable_log_requests": False,
            **(lora if source.lora else {}),
            **self._options,
        }
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
        except Exception as error:  # of vLLM's configuration, of the model's files, or of its process
            raise MLLMError(f"The engine vllm cannot run {source.name}: {first_line(error)}") from error

    def _lora(self) -> Any:
        from vllm.lora.request import LoRARequest

        folder = self._source and self._source.lora
        return LoRARequest(folder.name, 1, str(folder)) if folder else None
