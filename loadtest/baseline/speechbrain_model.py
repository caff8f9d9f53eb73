"""`1/model.py` of both baselines: the requests of one execution of Triton, through SpeechBrain's `encode_batch`.

Clips of one length are one batch as they are. Several lengths, which Triton batches only where the config has
`allow_ragged_batch`, are padded with zeros to the longest, and `wav_lens` has the share of each that is the clip.
"""

import json
import os
import sys
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence


class TritonPythonModel:
    """One instance of SpeechBrain's `EncoderClassifier`, on the GPU that Triton gives it or on all cores."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint of the config's parameter `origin`.

        Args:
            args: Triton's description of the instance; `model_config` is the config as JSON.
        """
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        # First: a package `export` beside Triton's stubs holds a part of the checkout's.
        sys.path.insert(0, parameters["checkout"])
        from export import checkpoint

        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._classifier = checkpoint.load_again(parameters["origin"]).classifier
        self._classifier.device = device
        for module in self._classifier.mods.values():
            module.to(device)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Give each request of an execution its own rows `[n, E]` or its own error."""
        try:
            waveforms = [pb_utils.get_input_tensor_by_name(request, "waveform").as_numpy() for request in requests]
            return [pb_utils.InferenceResponse([pb_utils.Tensor("embedding", rows)]) for rows in self._embed(waveforms)]
        except Exception as error:  # of SpeechBrain or torch, such as for a clip that is too short
            if len(requests) > 1:  # one bad clip must not fail the others
                return [response for request in requests for response in self.execute([request])]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"SpeechBrain cannot embed this: {error}"))]

    def _embed(self, waveforms: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Embed clips at 16 kHz, each array `[n, samples]` of one length, to arrays `[n, E]`."""
        items = [len(array) for array in waveforms]
        samples = [array.shape[1] for array in waveforms]
        if 0 in samples:
            raise ValueError("the clip is empty")  # its padded row would be NaN
        batch = pad_sequence([row for array in waveforms for row in torch.from_numpy(array)], batch_first=True)
        lengths = torch.tensor(np.repeat(samples, items) / max(samples), dtype=torch.float32)
        with torch.inference_mode():
            embeddings = self._classifier.encode_batch(batch, lengths)[:, 0].cpu().numpy()
        return list(np.split(embeddings, np.cumsum(items)[:-1]))
