"""ECAPA-TDNN over clips of any lengths that lie end to end in one row of samples, without padding.

Every operation respects the borders between clips, so a clip's embedding is, to rounding, the one it gets alone.
A convolution is a row gather with reflected positions and one matrix product; a mean over a clip is a product with
its column of a one-hot matrix. All shapes follow from the number of samples S and of clips B.

Symbols in shapes: S samples, B clips, T frame rows, C channels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint

SAMPLE_RATE = 16000  # Hz
MAX_AMPLITUDE = 1e4  # full scale is 1; anything beyond this is not audio
# A softmax whose exponents stay below this needs no shift by the maximum: exp(60) = 1e26 leaves a float32 room for
# the sum over an hour's frames and for the channels' squares.
EXP_LIMIT = 60.0

Window = tuple[int, int]  # kernel and dilation of a convolution
ID_DIGITS = 24  # of the weights' SHA-256: enough that no two models share them
GROUP = 512  # channels pooled at a time: 2 MB for ten seconds


class UnsupportedModel(Exception):
    """The checkpoint has something that the packed model does not reproduce."""


class PackedEcapa(nn.Module):
    """The packed model, built from the modules of a loaded SpeechBrain ``EncoderClassifier``.

    Args:
        classifier: the ``EncoderClassifier`` in eval mode; its modules are read, not changed.
        threshold: cosine above which two embeddings are of one speaker; NaN where there is none.
        max_seconds: a clip is embedded by its first ``max_seconds``, which bounds memory and time.
        group: channels that are aggregated and pooled at a time, for the caches of a CPU; None for all, on a GPU.
        half: with the frames and the large matrix products in float16. Inputs, outputs, features, pooled statistics,
            softmax, gates and the last layer stay float32.
    """

    info: Tensor

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_seconds: float = 30.0,
        group: int | None = GROUP,
        half: bool = False,
    ) -> None:
        super().__init__()
        classifier = checkpoint.classifier
        model = classifier.mods.embedding_model
        _check_supported(classifier)
        self.features = Features(classifier.mods.compute_features)
        self.hop = self.features.hop
        self.max_samples = round(max_seconds * SAMPLE_RATE)
        self.max_frames = self.max_samples // self.hop + 1

        first, *blocks = model.blocks
        self.first = Tdnn(first, Affine.identity(self.features.n_mels))
        given = self.first.output
        outputs = []
        self.blocks = nn.ModuleList()
        for block in blocks:
            packed = SERes2Net(block, given)
            self.blocks.append(packed)
            given = packed.output
            outputs.append(given)
        given = Affine(torch.cat([o.sign for o in outputs]), torch.cat([o.offset for o in outputs]))
        mfa = Tdnn(model.mfa, given)
        self.mfa_window = mfa.window
        self.pooling = AttentivePooling(mfa, model.asp, group or given.sign.shape[0])
        self.last = _final_linear(model, self.pooling.output)
        self.embedding_size: int = self.last.out_features

        layers = [module for module in self.modules() if isinstance(module, Tdnn)]
        self.windows = sorted({mfa.window, *(layer.window for layer in layers)})
        reach = max(kernel // 2 * dilation for kernel, dilation in self.windows)
        # Reflection needs more frames than it reaches over; SpeechBrain raises on a shorter clip.
        self.min_samples: int = max(1, reach * self.hop)
        self.dtype = torch.float16 if half else torch.float32  # of the frames
        if half:
            for module in self.modules():
                if isinstance(module, Tdnn | Res2Net | SERes2Net | ChannelGroup):
                    module.to_half()
        # A float32 holds whole numbers of 24 bits.
        identity = [float(int(checkpoint.sha256[i : i + 6], 16)) for i in range(0, ID_DIGITS, 6)]
        limits = [checkpoint.threshold, self.max_samples / SAMPLE_RATE, float(self.min_samples)]
        self.register_buffer("info", torch.tensor([limits + identity]))

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the clips of one batch.

        Args:
            waveform: float32 ``[S]``, 16 kHz, [-1, 1]: all clips end to end.
            lengths: int32 ``[B, 1]``, samples of each clip.

        Returns:
            ``embedding`` float32 ``[B, E]``: raw, not unit length. NaN for a clip that is too short, has samples
            that are not finite or beyond 1e4, or is empty; for the clips behind an empty one too, because
            a server may have stopped copying there. The same ``model_info`` float32 ``[B, 7]`` for every clip:
            verification threshold, longest clip in seconds, shortest clip in samples, and the first 24 hexadecimal
            digits of the weights' SHA-256 as four whole numbers of six digits.
        """
        lengths = lengths.reshape(-1)
        ends = torch.cumsum(lengths, 0, dtype=torch.int32)
        # Inside the samples even where the lengths are not theirs: beyond 32 bits an index would be a negative one.
        starts = torch.clamp(ends - lengths, min=0, max=waveform.shape[0])
        used = torch.clamp(lengths, min=0, max=self.max_samples)
        frames = used // self.hop + 1
        n_clips = lengths.shape[0]
        n_rows = waveform.shape[0] // self.hop + n_clips

        rows = torch.arange(n_rows, dtype=torch.int32, device=waveform.device)[: n_clips * self.max_frames]
        clips = Clips(rows, frames)
        features, audible = self.features(waveform, starts, used, clips, rows)

        gathers = {window: clips.window(window) for window in self.windows if window[0] > 1}
        x = self.first(features.to(self.dtype), gathers)
        outputs = []
        for block in self.blocks:
            x = block(x, clips, gathers)
            outputs.append(x)
        x = gather(torch.cat(outputs, dim=1), gathers, self.mfa_window)
        embedding = self.last(self.pooling(x, clips))

        empty_so_far = torch.cumsum((lengths <= 0).to(torch.int32), 0) > 0
        # Lengths of other samples than these; a sum that has gone round in 32 bits was negative on its way.
        torn = (ends[-1:] != waveform.shape[0]) | (torch.minimum(lengths, ends) < 0).any()
        valid = audible & (lengths >= self.min_samples) & ~empty_so_far & ~torn
        embedding = torch.where(valid[:, None], embedding, math.nan)
        return embedding, self.info.expand(n_clips, -1)


class Clips:
    """Which row belongs to which clip, and what follows from it.

    Args:
        rows: int32 ``[T]``, 0 to T - 1; T is at least the sum of ``counts``, rows left over belong to no clip.
        counts: int32 ``[B]``, rows of each clip.
    """

    def __init__(self, rows: Tensor, counts: Tensor) -> None:
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        starts = ends - counts
        begun = rows >= starts[:, None]
        self.member = begun & (rows < ends[:, None])  # bool [B, T]
        self.index = begun.to(torch.int32).sum(0, dtype=torch.int32) - 1  # [T], the last clip for rows left over
        self.start = torch.index_select(starts, 0, self.index)
        self.position = rows - self.start
        self.count = torch.index_select(counts, 0, self.index)
        self.sums = self.member.to(torch.float32)  # [B, T]
        self.means = self.sums / counts[:, None]  # [B, T]

    def mean(self, x: Tensor) -> Tensor:
        """Mean over each clip's rows: ``[T, C]`` to float32 ``[B, C]``."""
        return torch.mm(self.means, x.float())

    def sum(self, x: Tensor) -> Tensor:
        """Sum over each clip's rows: ``[T, C]`` to float32 ``[B, C]``."""
        return torch.mm(self.sums, x.float())

    def spread(self, x: Tensor) -> Tensor:
        """A clip's value for each of its rows: ``[B, C]`` to ``[T, C]``."""
        return torch.index_select(x, 0, self.index)

    def window(self, window: Window) -> Tensor:
        """Rows under a convolution kernel, reflected at both ends of the clip: int32 ``[T * kernel]``."""
        kernel, dilation = window
        taps = torch.arange(kernel, dtype=torch.int32, device=self.position.device)
        position = torch.abs(self.position[:, None] + (taps - kernel // 2) * dilation)
        last = (self.count - 1)[:, None]
        position = last - torch.abs(last - position)
        # Clips too short for a reflection, and rows left over, stay inside; their result is not used.
        position = torch.minimum(torch.clamp(position, min=0), last)
        # Rows are only short of the counts where the lengths are not those of the samples: NaN, but no crash.
        index = torch.clamp(self.start[:, None] + position, max=self.position.shape[0] - 1)
        return index.reshape(-1)


class Features(nn.Module):
    """SpeechBrain's log mel filterbank, its top-dB floor and mean normalisation taken per clip."""

    basis: Tensor
    mel: Tensor

    def __init__(self, fbank: Any) -> None:
        super().__init__()
        stft, mel = fbank.compute_STFT, fbank.compute_fbanks
        self.n_fft: int = stft.n_fft
        self.hop: int = stft.hop_length
        self.n_mels: int = mel.n_mels
        self.amin: float = mel.amin
        self.top_db: float = mel.top_db
        self.multiplier: float = mel.multiplier
        self.db_shift: float = mel.multiplier * mel.db_multiplier

        # A frame of n_fft samples is centred on p * hop. It lies within the hops p - reach .. p + reach, where hop p is
        # the samples from p * hop - hop / 2 on: so each sample is gathered once, not n_fft / hop times.
        self.reach = math.ceil((self.n_fft / 2 - self.hop / 2) / self.hop)
        taps = 2 * self.reach + 1
        window = torch.zeros(self.n_fft, dtype=torch.float64)
        left = (self.n_fft - stft.win_length) // 2
        window[left : left + stft.win_length] = stft.window.double()
        angle = torch.arange(self.n_fft, dtype=torch.float64)[:, None] * torch.arange(self.n_fft // 2 + 1)
        angle = 2 * math.pi / self.n_fft * (angle % self.n_fft)
        dft = window[:, None] * torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)
        before = self.reach * self.hop + self.hop // 2 - self.n_fft // 2
        basis = torch.zeros(taps * self.hop, dft.shape[1], dtype=torch.float64)
        basis[before : before + self.n_fft] = dft
        self.register_buffer("basis", basis.float())  # [taps * hop, 2 * bins]
        bins = self.n_fft // 2 + 1
        identity = torch.eye(bins)[None]
        log_mel, mel.log_mel = mel.log_mel, False
        matrix = mel(identity)[0]  # [bins, n_mels]: the filterbank's answer to each single bin
        mel.log_mel = log_mel
        self.register_buffer("mel", torch.cat([matrix, matrix]))  # the real parts' squares, then the imaginary ones'

    def forward(
        self, waveform: Tensor, starts: Tensor, used: Tensor, clips: Clips, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalised features float32 ``[T, n_mels]`` and, bool ``[B]``, whether all samples of a clip are audio."""
        # One hop more than frames in each clip, because the last frame reaches past its centre, and one hop of silence.
        n_clips = used.shape[0]
        extra = torch.arange(n_clips + 1, dtype=torch.int32, device=rows.device)
        hop_rows = torch.cat([rows, extra + rows.shape[0]])
        hops = Clips(hop_rows, used // self.hop + 2)
        offset = hops.position[:, None] * self.hop + torch.arange(
            -(self.hop // 2), self.hop - self.hop // 2, dtype=torch.int32, device=rows.device
        )
        silence = waveform.shape[0]
        length = torch.index_select(used, 0, hops.index)[:, None]
        inside = (offset >= 0) & (offset < length)  # never so in a row left over
        index = torch.where(inside, torch.index_select(starts, 0, hops.index)[:, None] + offset, silence)
        index = torch.clamp(index, max=silence)
        samples = torch.cat([waveform, torch.zeros(1, device=waveform.device)])
        samples = torch.index_select(samples, 0, index.reshape(-1)).reshape(-1, self.hop)
        ok = torch.abs(samples) <= MAX_AMPLITUDE  # False for NaN too
        samples = torch.where(ok, samples, 0.0)
        bad_rows = (~ok).any(1)
        audible = ~(hops.member & bad_rows).any(1)

        # Clip b's first hop row lies b rows behind its first frame row, since each clip has one hop row more.
        taps = torch.arange(-self.reach, self.reach + 1, dtype=torch.int32, device=rows.device)
        position = clips.position[:, None] + taps
        last = hop_rows.shape[0] - 1
        hop_index = (rows + clips.index)[:, None] + taps
        hop_index = torch.where((position >= 0) & (position <= clips.count[:, None]), hop_index, last)
        hop_index = torch.clamp(hop_index, max=last)
        frames = torch.index_select(samples, 0, hop_index.reshape(-1)).reshape(-1, self.basis.shape[0])

        spectrum = torch.mm(frames, self.basis)
        power = torch.mm(spectrum * spectrum, self.mel)
        level = self.multiplier * torch.log10(torch.clamp(power, min=self.amin)) - self.db_shift
        peak = torch.where(clips.member, level.amax(1), -math.inf).amax(1)
        # Relative to the peak first: the mean of a steady clip is then free of rounding.
        level = torch.clamp(level - clips.spread(peak[:, None]), min=-self.top_db)
        return level - clips.spread(clips.mean(level)), audible


class Affine(NamedTuple):
    """What the layers leave to the next linear one: true value = ``sign`` * given value + ``offset``, each ``[C]``."""

    sign: Tensor
    offset: Tensor

    @classmethod
    def identity(cls, channels: int) -> Affine:
        """Nothing left over."""
        return cls(torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))


def gather(x: Tensor, gathers: dict[Window, Tensor], window: Window) -> Tensor:
    """The frames under a convolution's kernel side by side: ``[T, C]`` to ``[T, kernel * C]``."""
    if window[0] == 1:
        return x
    return torch.index_select(x, 0, gathers[window]).reshape(x.shape[0], -1)


class Tdnn(nn.Module):
    """Convolution, ReLU and batch norm in one matrix product and a ReLU.

    Batch norm multiplies by s and adds t. ``|s|`` goes through the ReLU into the product; the sign of s and t are left
    as ``output`` to the next linear layer, which takes them in at no cost: reflection keeps constants.

    Args:
        block: SpeechBrain's ``TDNNBlock``.
        given: of the input.
    """

    def __init__(self, block: Any, given: Affine) -> None:
        super().__init__()
        conv = block.conv.conv
        self.window: Window = (conv.kernel_size[0], conv.dilation[0])
        scale, shift = _batch_norm(block.norm.norm)
        self.output = Affine(torch.where(scale < 0, -1.0, 1.0).double(), shift)
        weight, bias = _absorb(conv, given)
        weight = weight.permute(0, 2, 1).reshape(conv.out_channels, -1)
        self.linear = _linear(weight * scale.abs()[:, None], bias * scale.abs())

    def to_half(self) -> None:
        """Compute in float16."""
        self.linear.half()

    def forward(self, x: Tensor, gathers: dict[Window, Tensor]) -> Tensor:
        """``[T, C_in]`` to ``[T, C_out]``."""
        return torch.relu(self.linear(gather(x, gathers, self.window)))


class Res2Net(nn.Module):
    """SpeechBrain's ``Res2NetBlock``: each chunk of channels after the second takes in its predecessor's result."""

    def __init__(self, block: Any, given: Affine) -> None:
        super().__init__()
        self.scale: int = block.scale
        signs, offsets = given.sign.chunk(self.scale), given.offset.chunk(self.scale)
        self.layers = nn.ModuleList()
        outputs = [Affine(signs[0], offsets[0])]
        flips: list[Tensor | None] = []
        for inner, sign, offset in zip(block.blocks, signs[1:], offsets[1:], strict=True):
            previous = outputs[-1] if flips else Affine(sign, torch.zeros_like(offset))
            flip = sign * previous.sign
            flips.append(flip.float() if bool((flip < 0).any()) else None)
            layer = Tdnn(inner, Affine(sign, offset + previous.offset))
            self.layers.append(layer)
            outputs.append(layer.output)
        self.flips = nn.ParameterList([nn.Parameter(f, False) if f is not None else None for f in flips])
        self.output = Affine(torch.cat([o.sign for o in outputs]), torch.cat([o.offset for o in outputs]))

    def to_half(self) -> None:
        """Compute in float16, as its layers do."""
        self.flips.half()

    def forward(self, x: Tensor, gathers: dict[Window, Tensor]) -> Tensor:
        """``[T, C]`` to ``[T, C]``."""
        first, *chunks = torch.chunk(x, self.scale, dim=1)
        outputs = [first]
        for layer, flip, chunk in zip(self.layers, self.flips, chunks, strict=True):
            if len(outputs) > 1:
                chunk = chunk + (outputs[-1] if flip is None else outputs[-1] * flip)
            outputs.append(layer(chunk, gathers))
        return torch.cat(outputs, dim=1)


class SERes2Net(nn.Module):
    """SpeechBrain's ``SERes2NetBlock``; what is left over of its input is left over of its output too."""

    shift: Tensor
    gate_sign: Tensor

    def __init__(self, block: Any, given: Affine) -> None:
        super().__init__()
        self.tdnn1 = Tdnn(block.tdnn1, given)
        self.res2net = Res2Net(block.res2net_block, self.tdnn1.output)
        self.tdnn2 = Tdnn(block.tdnn2, self.res2net.output)
        self.shortcut = None
        if block.shortcut is not None:
            weight, bias = _absorb(block.shortcut.conv, given)
            self.shortcut = _linear(weight[:, :, 0], bias)
            given = Affine.identity(block.out_channels)
        self.output = given
        # x below is short of tdnn2's true output by its sign alone; the gate puts it right, in the residual's terms.
        sign, offset = self.tdnn2.output
        self.register_buffer("shift", (sign * offset).float())
        self.squeeze = _linear(*_flat(_absorb(block.se_block.conv1.conv, Affine(sign, torch.zeros_like(offset)))))
        self.excite = _linear(*_flat(_absorb(block.se_block.conv2.conv, None)))
        self.register_buffer("gate_sign", (sign * given.sign).float())

    def to_half(self) -> None:
        """Compute in float16 what has a row for each frame."""
        self.shift = self.shift.half()
        if self.shortcut is not None:
            self.shortcut.half()

    def forward(self, x: Tensor, clips: Clips, gathers: dict[Window, Tensor]) -> Tensor:
        """``[T, C_in]`` to ``[T, C_out]``."""
        residual = x if self.shortcut is None else self.shortcut(x)
        x = self.tdnn2(self.res2net(self.tdnn1(x, gathers), gathers), gathers) + self.shift
        gate = self.gate_sign * torch.sigmoid(self.excite(torch.relu(self.squeeze(clips.mean(x)))))
        return x * clips.spread(gate.to(x.dtype)) + residual


class ChannelGroup(nn.Module):
    """Some of the aggregated channels: what makes them, and their part in the attention over frames.

    Channels meet only in the attention's hidden layer. Handling them in groups keeps a group's frames in the CPU's
    caches from one pass to the next.
    """

    def __init__(self, aggregate: nn.Linear, on_x: nn.Linear, attention: nn.Linear, channels: slice) -> None:
        super().__init__()
        self.aggregate = _linear(aggregate.weight[channels], aggregate.bias[channels])
        self.on_x = _linear(on_x.weight[:, channels], None)
        self.attention = _linear(attention.weight[channels], None)

    def to_half(self) -> None:
        """Compute the matrix products in float16."""
        self.half()

    def forward(self, x: Tensor, clips: Clips, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``[T, C_in]`` to float32: channels centred in each clip ``[T, G]``; mean, std ``[B, G]``; ``[T, hidden]``."""
        dtype = x.dtype
        x = torch.relu(self.aggregate(x)).float()
        mean = clips.mean(x)
        x = x - clips.spread(mean)
        std = torch.sqrt(torch.clamp(clips.mean(x * x), min=eps))
        return x, mean, std, self.on_x(x.to(dtype)).float()

    def pool(self, x: Tensor, hidden: Tensor, clips: Clips, eps: float) -> tuple[Tensor, Tensor]:
        """Attention-weighted mean, from the plain one, and std ``[B, G]`` of the centred channels ``[T, G]``."""
        weight = torch.exp(self.attention(hidden).float())
        total = clips.sum(weight)
        weighted = weight * x
        drift = clips.sum(weighted) / total
        variance = clips.sum(weighted * x) / total - drift * drift
        return drift, torch.sqrt(torch.clamp(variance, min=eps))


class AttentivePooling(nn.Module):
    """SpeechBrain's ``mfa`` and ``AttentiveStatisticsPooling``: attention-weighted mean and std of each channel.

    Both standard deviations are taken about the clip's plain mean: it keeps their digits where a channel hardly moves.
    """

    shift: Tensor

    def __init__(self, mfa: Tdnn, pooling: Any, group: int) -> None:
        super().__init__()
        given = mfa.output
        channels = given.sign.shape[0]
        self.eps: float = pooling.eps
        self.output = Affine(
            torch.cat([given.sign, torch.ones(channels)]), torch.cat([given.offset, torch.zeros(channels)])
        )
        # Over [x; mean; std]: x = centred + mean, so the mean's weights add up; all but x's part is a vector a clip.
        scale, shift = _batch_norm(pooling.tdnn.norm.norm)
        conv = pooling.tdnn.conv.conv
        bias = conv.bias.double() * scale.abs()
        on_x, on_mean, on_std = (conv.weight[:, :, 0].double() * scale.abs()[:, None]).split(channels, dim=1)
        on_mean = on_mean + on_x
        bias = bias + on_mean @ given.offset
        self.context = _linear(torch.cat([on_mean * given.sign, on_std], dim=1), bias)
        # tanh is odd: the batch norm's sign goes through it into the attention's last layer, whose bias, the same for
        # all frames of a clip, the softmax cancels.
        sign = torch.where(scale < 0, -1.0, 1.0).double()
        self.register_buffer("shift", (sign * shift).float())
        attention = pooling.conv.conv.weight[:, :, 0].double() * sign
        largest = float(attention.abs().sum(1).max())
        if largest > EXP_LIMIT:
            raise UnsupportedModel(
                f"an attention output can reach {largest:.1f} (sum of its absolute weights), the softmax without "
                f"shift is safe up to {EXP_LIMIT:.0f}"
            )
        layers = mfa.linear, _linear(on_x * given.sign, None), _linear(attention, None)
        starts = range(0, channels, group)
        self.groups = nn.ModuleList(ChannelGroup(*layers, slice(start, start + group)) for start in starts)

    def forward(self, x: Tensor, clips: Clips) -> Tensor:
        """Frames ``[T, C_in]`` to ``[B, 2 C]``: means, then standard deviations."""
        parts = [group(x, clips, self.eps) for group in self.groups]
        centred, means, plain_stds, hiddens = zip(*parts, strict=True)
        context = self.context(torch.cat([*means, *plain_stds], dim=1))
        hidden = torch.relu(sum(hiddens[1:], hiddens[0]) + clips.spread(context))
        hidden = torch.tanh(hidden + self.shift).to(x.dtype)
        drifts, stds = [], []
        for group, channels in zip(self.groups, centred, strict=True):
            assert isinstance(group, ChannelGroup)
            drift, std = group.pool(channels, hidden, clips, self.eps)
            drifts.append(drift)
            stds.append(std)
        return torch.cat([torch.cat(means, dim=1) + torch.cat(drifts, dim=1), *stds], dim=1)


def _check_supported(classifier: Any) -> None:
    """Refuse what would be silently computed otherwise than SpeechBrain does."""
    mods = classifier.mods
    fbank, norm, model = mods.compute_features, mods.mean_var_norm, mods.embedding_model
    stft = fbank.compute_STFT
    convs = [module for module in model.modules() if isinstance(module, nn.Conv1d)]
    tdnns = [module for module in model.modules() if type(module).__name__ == "TDNNBlock"]
    refused = {
        "compute_features with deltas or context": fbank.deltas or fbank.context,
        f"a sample rate of {stft.sample_rate} Hz (16000 is served)": stft.sample_rate != SAMPLE_RATE,
        "an STFT that is not centred, zero padded, one-sided and unnormalised": not stft.center
        or stft.pad_mode != "constant"
        or stft.normalized_stft
        or not stft.onesided,
        "a filterbank without log": not fbank.compute_fbanks.log_mel,
        "a mean_var_norm other than norm_type sentence with std_norm False": norm.norm_type != "sentence"
        or norm.std_norm,
        "grouped convolutions": any(conv.groups != 1 for conv in convs),
        "kernels of even size": any(conv.kernel_size[0] % 2 == 0 for conv in convs),
        "an activation other than ReLU": any(not isinstance(block.activation, nn.ReLU) for block in tdnns),
        "attentive pooling without global context": not model.asp.global_context,
    }
    found = [reason for reason, is_so in refused.items() if is_so]
    if found:
        raise UnsupportedModel(f"the checkpoint has {' and '.join(found)}, which the packed model does not reproduce")


def _batch_norm(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode, float64."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _absorb(conv: Any, given: Affine | None) -> tuple[Tensor, Tensor]:
    """Weight ``[C_out, C_in, kernel]`` and bias, float64, of a convolution of what ``given`` leaves over."""
    weight, bias = conv.weight.double(), conv.bias.double()
    if given is None:
        return weight, bias
    return weight * given.sign[None, :, None], bias + weight.sum(2) @ given.offset


def _flat(parameters: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of a convolution with kernel 1."""
    return parameters[0][:, :, 0], parameters[1]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear.requires_grad_(False)


def _final_linear(model: Any, given: Affine) -> nn.Linear:
    """The pooled statistics' batch norm folded into the last layer."""
    scale, shift = _batch_norm(model.asp_bn.norm)
    weight = model.fc.conv.weight[:, :, 0].double()
    bias = model.fc.conv.bias.double() + weight @ (shift + scale * given.offset)
    return _linear(weight * scale * given.sign, bias)
