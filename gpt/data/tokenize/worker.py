"""Worker processes: pickled chunks in, encoded chunks out, through one socket per worker.

The workers are a program of their own, neither a fork of the parent nor a `multiprocessing` child:
the parent's threads, CUDA contexts and main module stay out of it, and only numpy and the encoder
are imported (about 80 MB). The program loads these once, forks one process per socket and waits for
them, so the start is paid once and not per worker. When the parent dies, by any signal, the sockets
close and all of them exit.
"""

import contextlib
import gc
import os
import pickle
import socket
import sys
import traceback

from gpt.data.tokenize.encoders import EncodedChunk, EngineName, encode_chunk, load_encoder
from gpt.data.tokenize.tokenizer import EncoderMismatchError


def main() -> None:
    """Run the workers. Arguments: the engine, then the descriptor of each worker's socket."""
    engine: EngineName = "gigatoken" if sys.argv[1] == "gigatoken" else "tiktoken"
    descriptors = [int(descriptor) for descriptor in sys.argv[2:]]
    with contextlib.suppress(Exception):  # reported with the first chunk, which tries again
        load_encoder(engine)
    gc.freeze()  # a collection would write to pages that the workers share
    for _ in range(len(descriptors)):
        if not os.fork():
            _run_worker(engine, *descriptors)
        os.close(descriptors.pop(0))
    with contextlib.suppress(ChildProcessError):  # all workers have ended
        while True:
            code = os.waitstatus_to_exitcode(os.wait()[1])
            if code < 0:
                os.killpg(0, -code)  # end all as the failed one did: the parent reads the status
            elif code:
                sys.exit(code)  # the others end when the parent then closes their sockets


def _run_worker(engine: EngineName, own: int, *others: int) -> None:
    """Answer chunks until the parent closes the socket, then exit; does not return."""
    for descriptor in others:
        os.close(descriptor)
    try:
        stream = socket.socket(fileno=own).makefile("rwb")
        with contextlib.suppress(EOFError, ConnectionError, pickle.UnpicklingError):
            while True:
                chunk = pickle.load(stream)
                answer: EncodedChunk | Exception
                try:
                    answer = encode_chunk(engine, chunk)
                except EncoderMismatchError as mismatch:
                    answer = mismatch
                except Exception:
                    answer = RuntimeError(f"in a tokenizing worker:\n{traceback.format_exc()}")
                pickle.dump(answer, stream, pickle.HIGHEST_PROTOCOL)
                stream.flush()
                del chunk, answer  # free before the next chunk arrives
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
