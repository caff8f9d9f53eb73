"""ECAPA-TDNN over a packed batch: clips of any lengths end to end in one row of samples, without padding.

Every operation stops at the borders between clips, so a clip's embedding is, to rounding, the one it gets alone::

    waveform [S]    |------- clip a -------||---- clip b ----|
    rows [T, C]      a0 a1 a2 a3 a4 a5 a6    b0 b1 b2 b3 b4   ..     one for each frame of 10 ms; some may be left over

A convolution of kernel 3 and dilation 2 gathers three rows for each row, reflected at the borders of its clip::

    tap -2           a2 a1 a0 a1 a2 a3 a4    b2 b1 b0 b1 b2
    tap  0           a0 a1 a2 a3 a4 a5 a6    b0 b1 b2 b3 b4
    tap +2           a2 a3 a4 a5 a6 a5 a4    b2 b3 b4 b3 b2

It lays them side by side, ``[T, 3 C]``, and multiplies them by its weights, ``[3 C, C']``. A sum over the rows of each
clip is a product with the one-hot matrix of clips and rows, ``[B, T]``.

The graph has matrix products, gathers and element-wise operations, no convolution, padding or loop. All shapes follow
from the number of samples and of clips. Batch norms are folded into the matrix products around them. Guards answer NaN
for bad clips and for lengths that do not fit the samples: see :meth:`PackedEcapa.forward`.

Symbols in shapes: S samples, B clips, T rows, C channels, E numbers of an embedding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from ecapa_triton.audio import MAX_AMPLITUDE, SAMPLE_RATE
from torch import Tensor, nn

from .checkpoint import Checkpoint

MAX_SECONDS = 30.0  # of a clip that are embedded, unless the export says otherwise
GROUP = 512  # channels pooled at a time: 512 * 1001 rows * 4 bytes, so 10 s of audio fit in 2 MB of a CPU's cache
# A softmax over smaller exponents needs no shift by the maximum: exp(60) = 1e26, and the sum over an hour's rows
# (3.6e5) of squares of channels stays far below the largest float32 (3e38).
MAX_EXPONENT = 60.0
# Parts of the rows, for means. PyTorch's product for one clip adds up its rows one by one, which over 30 s of a steady
# sound is off by 4e-5; in four parts by a quarter of that.
PARTS = 4
ID_DIGITS = 24  # of the weights' SHA-256, hexadecimal: the model identity
ID_STEP = 6  # of these digits in a number: a float32 holds whole numbers of 24 bits


class UnsupportedModel(Exception):
    """The checkpoint has a feature that the packed model does not reproduce."""


class Window(NamedTuple):
    """The rows under a convolution: ``kernel`` taps (an odd number), ``dilation`` rows apart."""

    kernel: int
    dilation: int


class PackedEcapa(nn.Module):
    """The packed model of a loaded checkpoint.

    Args:
        checkpoint: its modules are read, not changed.
        max_seconds: a clip is embedded by its first ``max_seconds``, which bounds memory and time.
        group: channels that are aggregated and pooled at a time; None for all at once, which suits a GPU.
        half: compute rows and the large matrix products in float16. Inputs, outputs, features, pooled statistics,
            softmax, gates and the last layer stay float32.
        exact: add up means in float64, so that they do not depend on a clip's place in the batch. Before int8 rows the
            last bit of a float32 mean decides where a value is rounded to.

    Raises:
        UnsupportedModel: the checkpoint has a feature that the packed model does not reproduce.
    """

    info: Tensor

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_seconds: float = MAX_SECONDS,
        group: int | None = GROUP,
        half: bool = False,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.exact = exact
        classifier = checkpoint.classifier
        model = classifier.mods.embedding_model
        _check_supported(classifier)
        self.features = Features(classifier.mods.compute_features)
        self.hop = self.features.hop
        self.max_samples = round(max_seconds * SAMPLE_RATE)
        self.max_frames = self.max_samples // self.hop + 1

        first, *blocks = model.blocks
        self.first = Tdnn(first, Affine.identity(self.features.n_mels))
        stages: list[SERes2Net] = []
        for block in blocks:
            stages.append(SERes2Net(block, stages[-1].pending if stages else self.first.pending))
        self.blocks = nn.ModuleList(stages)
        aggregate = Tdnn(model.mfa, Affine.concatenated([stage.pending for stage in stages]))
        self.aggregate_window = aggregate.window
        self.pooling = AttentivePooling(aggregate, model.asp, group)
        self.last = _last_linear(model, self.pooling.pending)
        self.embedding_size: int = self.last.out_features

        self.windows = sorted({aggregate.window, *(part.window for part in self.modules() if isinstance(part, Tdnn))})
        # Reflection needs more rows than it reaches over; SpeechBrain raises on a shorter clip.
        reach = max(kernel // 2 * dilation for kernel, dilation in self.windows)
        self.min_samples: int = max(1, reach * self.hop)
        self.dtype = torch.float16 if half else torch.float32  # of the rows
        if half:
            _to_half(self)
        identity = [float(int(checkpoint.sha256[i : i + ID_STEP], 16)) for i in range(0, ID_DIGITS, ID_STEP)]
        limits = [checkpoint.threshold, self.max_samples / SAMPLE_RATE, float(self.min_samples)]
        self.register_buffer("info", torch.tensor([limits + identity]))

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the clips of one packed batch.

        Args:
            waveform: float32 ``[S]``, 16 kHz, in [-1, 1]: all clips end to end.
            lengths: int32 ``[B, 1]``, samples of each clip.

        Returns:
            ``embedding`` float32 ``[B, E]``, raw, not of unit length. Its guards answer a row of NaN where a clip is
            empty or follows an empty one, at which a server may have stopped copying ("empty"); has fewer than
            ``min_samples`` samples ("short"); has a sample that is not finite or is beyond 1e4 ("not-finite"); and for
            the whole batch if its lengths do not add up to S ("torn"). Samples past ``max_seconds`` are not read.

            ``model_info`` float32 ``[B, 7]``, the same for every clip: threshold, longest clip in seconds, shortest
            clip in samples, and the model identity in four whole numbers of six hexadecimal digits.
        """
        lengths = lengths.reshape(-1)
        ends = torch.cumsum(lengths, 0, dtype=torch.int32)
        # Within the samples for any lengths: past 32 bits, an index would turn negative.
        starts = torch.clamp(ends - lengths, min=0, max=waveform.shape[0])
        used = torch.clamp(lengths, min=0, max=self.max_samples)
        frames = used // self.hop + 1  # as of a centred STFT
        n_clips = lengths.shape[0]
        n_rows = waveform.shape[0] // self.hop + n_clips  # at least the sum of frames

        firsts = torch.arange(0, n_rows, PARTS, dtype=torch.int32, device=waveform.device)
        firsts = firsts[: (n_clips * self.max_frames + PARTS - 1) // PARTS]
        rows = (firsts[:, None] + torch.arange(PARTS, dtype=torch.int32, device=waveform.device)).reshape(-1)
        clips = Clips(rows, frames, self.exact)
        features, audible = self.features(waveform, starts, used, clips)

        taps = {window: clips.taps(window) for window in self.windows if window.kernel > 1}
        x = self.first(features.to(self.dtype), taps)
        outputs = []
        for block in self.blocks:
            x = block(x, clips, taps)
            outputs.append(x)
        x = gather(torch.cat(outputs, dim=1), taps, self.aggregate_window)
        embedding = self.last(self.pooling(x, clips))

        empty_so_far = torch.cumsum((lengths <= 0).to(torch.int32), 0) > 0
        # A sum of lengths that wraps around in 32 bits is negative at some clip on its way.
        torn = (ends[-1:] != waveform.shape[0]) | (torch.minimum(lengths, ends) < 0).any()
        valid = audible & (lengths >= self.min_samples) & ~empty_so_far & ~torn
        embedding = torch.where(valid[:, None], embedding, math.nan)
        return embedding, self.info.expand(n_clips, -1)


class Clips:
    """Which row belongs to which clip, from ``rows``, int32 ``[T]``, 0 to T - 1, and ``counts``, int32 ``[B]``.

    The first ``counts[0]`` rows are those of the first clip, and so on. Left-over rows belong to no clip.
    """

    def __init__(self, rows: Tensor, counts: Tensor, exact: bool = False) -> None:
        self.exact = exact
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        starts = ends - counts
        begun = rows >= starts[:, None]
        self.rows = rows
        self.member = begun & (rows < ends[:, None])  # bool [B, T]
        self.index = begun.to(torch.int32).sum(0, dtype=torch.int32) - 1  # [T], the last clip for left-over rows
        self.start = torch.index_select(starts, 0, self.index)  # [T], first row of the row's clip
        self.position = rows - self.start  # [T], in the clip
        self.count = torch.index_select(counts, 0, self.index)  # [T], rows of the row's clip
        self.sums = self.member.to(torch.float32)  # [B, T]
        self.means = self.sums / counts[:, None]  # [B, T]

    def mean(self, x: Tensor) -> Tensor:
        """Mean over each clip's rows, T a multiple of ``PARTS``: ``[T, C]`` to float32 ``[B, C]``."""
        if self.exact:
            sums = self.sums.double()
            return (torch.mm(sums, x.double()) / sums.sum(1, keepdim=True)).float()
        means = self.means.reshape(-1, PARTS, x.shape[0] // PARTS).transpose(0, 1)  # [PARTS, B, T / PARTS]
        return torch.bmm(means, x.float().reshape(PARTS, -1, x.shape[1])).sum(0)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over each clip's rows: ``[T, C]`` to float32 ``[B, C]``."""
        return torch.mm(self.sums, x.float())

    def spread(self, x: Tensor) -> Tensor:
        """The clip's value for each row: ``[B, C]`` to ``[T, C]``."""
        return torch.index_select(x, 0, self.index)

    def taps(self, window: Window) -> Tensor:
        """Rows under a convolution at each row, reflected at both borders of the clip: int32 ``[T * kernel]``."""
        taps = torch.arange(window.kernel, dtype=torch.int32, device=self.position.device)
        position = torch.abs(self.position[:, None] + (taps - window.kernel // 2) * window.dilation)
        last = (self.count - 1)[:, None]
        position = last - torch.abs(last - position)
        # In clips too short to reflect, and in left-over rows, any row will do: their result is not used.
        position = torch.minimum(torch.clamp(position, min=0), last)
        # Torn lengths may point past the last row.
        return torch.clamp(self.start[:, None] + position, max=self.position.shape[0] - 1).reshape(-1)


class Features(nn.Module):
    """SpeechBrain's ``Fbank``, with the top-dB floor and the mean normalisation of each clip."""

    basis: Tensor
    mel: Tensor

    def __init__(self, fbank: Any) -> None:
        super().__init__()
        stft, mel = fbank.compute_STFT, fbank.compute_fbanks
        self.n_fft: int = stft.n_fft  # samples of a frame
        self.hop: int = stft.hop_length  # samples from one frame to the next
        self.n_mels: int = mel.n_mels
        self.amin: float = mel.amin
        self.top_db: float = mel.top_db
        self.multiplier: float = mel.multiplier
        self.db_shift: float = mel.multiplier * mel.db_multiplier

        # Hop p is the samples [p * hop - hop / 2, p * hop + hop / 2). The frame centred on p * hop lies within the hops
        # p - reach to p + reach, so gathering hops reads each sample once in place of n_fft / hop times.
        self.reach = math.ceil((self.n_fft / 2 - self.hop / 2) / self.hop)
        window = torch.zeros(self.n_fft, dtype=torch.float64)
        left = (self.n_fft - stft.win_length) // 2
        window[left : left + stft.win_length] = stft.window.double()
        bins = self.n_fft // 2 + 1
        angle = torch.arange(self.n_fft, dtype=torch.float64)[:, None] * torch.arange(bins)
        angle = 2 * math.pi / self.n_fft * (angle % self.n_fft)
        dft = window[:, None] * torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)
        before = self.reach * self.hop + self.hop // 2 - self.n_fft // 2
        basis = torch.zeros((2 * self.reach + 1) * self.hop, dft.shape[1], dtype=torch.float64)
        basis[before : before + self.n_fft] = dft
        self.register_buffer("basis", basis.float())  # [hops under a frame * hop, 2 * bins]
        mel.log_mel = False
        matrix = mel(torch.eye(bins)[None])[0]  # [bins, n_mels]: the filterbank's response to each bin
        mel.log_mel = True  # as checked before
        self.register_buffer("mel", torch.cat([matrix, matrix]))  # for squares of real parts, then of imaginary parts

    def forward(self, waveform: Tensor, starts: Tensor, used: Tensor, clips: Clips) -> tuple[Tensor, Tensor]:
        """Normalised features float32 ``[T, n_mels]`` and bool ``[B]``, whether every sample of a clip is audio.

        Each clip is the ``used`` samples, int32 ``[B]``, from ``starts``, int32 ``[B]``, of ``waveform`` ``[S]``.
        """
        # A clip has one hop more than frames, since its last frame reaches past its centre. One more hop is silence.
        rows = clips.rows
        extra = torch.arange(used.shape[0] + 1, dtype=torch.int32, device=rows.device)
        hop_rows = torch.cat([rows, extra + rows.shape[0]])
        hops = Clips(hop_rows, used // self.hop + 2)
        offset = hops.position[:, None] * self.hop + torch.arange(
            -(self.hop // 2), self.hop - self.hop // 2, dtype=torch.int32, device=rows.device
        )
        silence = waveform.shape[0]
        length = torch.index_select(used, 0, hops.index)[:, None]
        inside = (offset >= 0) & (offset < length)  # False in left-over rows
        index = torch.where(inside, torch.index_select(starts, 0, hops.index)[:, None] + offset, silence)
        index = torch.clamp(index, max=silence)
        samples = torch.cat([waveform, torch.zeros(1, device=waveform.device)])
        samples = torch.index_select(samples, 0, index.reshape(-1)).reshape(-1, self.hop)
        # A NaN in one row would spread to all clips through the zeros of the one-hot products.
        ok = torch.abs(samples) <= MAX_AMPLITUDE  # False for NaN too
        samples = torch.where(ok, samples, 0.0)
        audible = ~(hops.member & (~ok).any(1)).any(1)

        # Each clip has one hop row more than frame rows, so those of clip b begin b rows later.
        taps = torch.arange(-self.reach, self.reach + 1, dtype=torch.int32, device=rows.device)
        position = clips.position[:, None] + taps
        last = hop_rows.shape[0] - 1
        hop_index = (rows + clips.index)[:, None] + taps
        hop_index = torch.where((position >= 0) & (position <= clips.count[:, None]), hop_index, last)
        hop_index = torch.clamp(hop_index, max=last)
        frames = torch.index_select(samples, 0, hop_index.reshape(-1)).reshape(-1, self.basis.shape[0])

        spectrum = torch.mm(frames, self.basis)  # [T, 2 * bins]
        power = torch.mm(spectrum * spectrum, self.mel)
        level = self.multiplier * torch.log10(torch.clamp(power, min=self.amin)) - self.db_shift  # dB
        peak = torch.where(clips.member, level.amax(1), -math.inf).amax(1)  # [B]
        # Relative to the peak before the mean is taken: that of a steady clip is then free of rounding.
        level = torch.clamp(level - clips.spread(peak[:, None]), min=-self.top_db)
        level = level - clips.spread(clips.mean(level))
        return level - clips.spread(clips.mean(level)), audible  # without the rounding of the first mean


class Affine(NamedTuple):
    """A map that is pending on stored rows: true value = ``sign`` * stored value + ``offset``, float64 ``[C]`` each.

    The next matrix product applies it at no cost, since gathers commute with it.
    """

    sign: Tensor
    offset: Tensor

    @classmethod
    def identity(cls, channels: int) -> Affine:
        """Nothing pending."""
        return cls(torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))

    @classmethod
    def concatenated(cls, maps: list[Affine]) -> Affine:
        """The map of tensors that are concatenated by channels."""
        return cls(torch.cat([one.sign for one in maps]), torch.cat([one.offset for one in maps]))


def gather(x: Tensor, taps: dict[Window, Tensor], window: Window) -> Tensor:
    """The rows under a convolution side by side: ``[T, C]`` to ``[T, kernel * C]``."""
    if window.kernel == 1:
        return x
    return torch.index_select(x, 0, taps[window]).reshape(x.shape[0], -1)


class Tdnn(nn.Module):
    """SpeechBrain's ``TDNNBlock``, convolution, ReLU and batch norm, as one matrix product and a ReLU.

    The batch norm multiplies by s and adds t. ``|s|`` passes through the ReLU into the matrix product; the sign of s
    and t stay pending.
    """

    def __init__(self, block: Any, pending: Affine) -> None:
        super().__init__()
        conv = block.conv.conv
        self.window = Window(conv.kernel_size[0], conv.dilation[0])
        scale, shift = _batch_norm(block.norm.norm)
        self.pending = Affine(torch.where(scale < 0, -1.0, 1.0).double(), shift)
        weight, bias = _absorb(conv, pending)
        weight = weight.permute(0, 2, 1).reshape(conv.out_channels, -1)  # [C_out, kernel * C_in], as gather lays rows
        self.linear = _linear(weight * scale.abs()[:, None], bias * scale.abs())

    def forward(self, x: Tensor, taps: dict[Window, Tensor]) -> Tensor:
        """``[T, C_in]`` to ``[T, C_out]``."""
        return torch.relu(self.linear(gather(x, taps, self.window)))


class Res2Net(nn.Module):
    """SpeechBrain's ``Res2NetBlock``: each chunk of channels after the second is added to the result before it."""

    def __init__(self, block: Any, pending: Affine) -> None:
        super().__init__()
        self.scale: int = block.scale
        signs, offsets = pending.sign.chunk(self.scale), pending.offset.chunk(self.scale)
        self.layers = nn.ModuleList()
        outputs = [Affine(signs[0], offsets[0])]
        # A sum needs both terms under one sign: the result before is multiplied by `flip` where the signs differ.
        flips: list[Tensor | None] = []
        for inner, sign, offset in zip(block.blocks, signs[1:], offsets[1:], strict=True):
            previous = outputs[-1] if flips else Affine(sign, torch.zeros_like(offset))
            flip = sign * previous.sign
            flips.append(flip.float() if bool((flip < 0).any()) else None)
            layer = Tdnn(inner, Affine(sign, offset + previous.offset))
            self.layers.append(layer)
            outputs.append(layer.pending)
        self.flips = nn.ParameterList([nn.Parameter(f, False) if f is not None else None for f in flips])
        self.pending = Affine.concatenated(outputs)

    def forward(self, x: Tensor, taps: dict[Window, Tensor]) -> Tensor:
        """``[T, C]`` to ``[T, C]``."""
        first, *chunks = torch.chunk(x, self.scale, dim=1)
        outputs = [first]
        for layer, flip, chunk in zip(self.layers, self.flips, chunks, strict=True):
            if len(outputs) > 1:
                chunk = chunk + (outputs[-1] if flip is None else outputs[-1] * flip)
            outputs.append(layer(chunk, taps))
        return torch.cat(outputs, dim=1)


class SERes2Net(nn.Module):
    """SpeechBrain's ``SERes2NetBlock``. The map that is pending on its input is pending on its output too."""

    shift: Tensor
    gate_sign: Tensor

    def __init__(self, block: Any, pending: Affine) -> None:
        super().__init__()
        self.tdnn1 = Tdnn(block.tdnn1, pending)
        self.res2net = Res2Net(block.res2net_block, self.tdnn1.pending)
        self.tdnn2 = Tdnn(block.tdnn2, self.res2net.pending)
        self.shortcut = None
        if block.shortcut is not None:
            self.shortcut = _pointwise(block.shortcut.conv, pending)
            pending = Affine.identity(block.out_channels)
        self.pending = pending
        # The shift is added to tdnn2's output at once; the gate then applies its sign, relative to the residual's.
        sign, offset = self.tdnn2.pending
        self.register_buffer("shift", (sign * offset).float())
        self.squeeze = _pointwise(block.se_block.conv1.conv, Affine(sign, torch.zeros_like(offset)))
        self.excite = _pointwise(block.se_block.conv2.conv, Affine.identity(block.se_block.conv2.conv.in_channels))
        self.register_buffer("gate_sign", (sign * pending.sign).float())

    def forward(self, x: Tensor, clips: Clips, taps: dict[Window, Tensor]) -> Tensor:
        """``[T, C_in]`` to ``[T, C_out]``."""
        residual = x if self.shortcut is None else self.shortcut(x)
        x = self.tdnn2(self.res2net(self.tdnn1(x, taps), taps), taps) + self.shift
        gate = self.gate_sign * torch.sigmoid(self.excite(torch.relu(self.squeeze(clips.mean(x)))))  # float32 [B, C]
        return x * clips.spread(gate.to(x.dtype)) + residual


class ChannelGroup(nn.Module):
    """Some of the aggregated channels, with their part in the attention over rows.

    Channels meet only in the attention's hidden layer. Handling them in groups keeps a group's rows in the CPU's caches
    from one pass to the next.
    """

    def __init__(self, aggregate: nn.Linear, on_x: nn.Linear, attention: nn.Linear, channels: slice) -> None:
        super().__init__()
        self.aggregate = _linear(aggregate.weight[channels], aggregate.bias[channels])
        self.on_x = _linear(on_x.weight[:, channels], None)
        self.attention = _linear(attention.weight[channels], None)

    def forward(self, x: Tensor, clips: Clips, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``[T, C_in]`` to G channels, all float32: less their clip's mean ``[T, G]``, mean and std ``[B, G]``.

        The last result is their part of the attention's hidden layer, ``[T, H]``.
        """
        dtype = x.dtype
        x = torch.relu(self.aggregate(x)).float()
        mean = torch.mm(clips.means, x)
        x = x - clips.spread(mean)
        std = torch.sqrt(torch.clamp(torch.mm(clips.means, x * x), min=eps))
        return x, mean, std, self.on_x(x.to(dtype)).float()

    def pool(self, x: Tensor, hidden: Tensor, clips: Clips, eps: float) -> tuple[Tensor, Tensor]:
        """Attention-weighted mean and standard deviation ``[B, G]`` of centred channels ``[T, G]``, float32."""
        weight = torch.exp(self.attention(hidden).float())  # a softmax with its division below
        total = clips.sum(weight)
        weighted = weight * x
        drift = clips.sum(weighted) / total
        variance = clips.sum(weighted * x) / total - drift * drift
        return drift, torch.sqrt(torch.clamp(variance, min=eps))


class AttentivePooling(nn.Module):
    """SpeechBrain's ``mfa`` and ``AttentiveStatisticsPooling``: attention-weighted mean and std of each channel.

    Both standard deviations are taken about the clip's plain mean, which keeps their digits where a channel hardly
    varies.
    """

    shift: Tensor

    def __init__(self, aggregate: Tdnn, pooling: Any, group: int | None) -> None:
        super().__init__()
        pending = aggregate.pending
        channels = pending.sign.shape[0]
        self.eps: float = pooling.eps
        self.pending = Affine.concatenated([pending, Affine.identity(channels)])
        # The attention's first layer is over [x; mean; std]. With x = centred + mean, the mean's weights add up, and
        # only the part over the centred channels is computed for each row: a third of the work.
        scale, shift = _batch_norm(pooling.tdnn.norm.norm)
        conv = pooling.tdnn.conv.conv
        bias = conv.bias.double() * scale.abs()
        on_x, on_mean, on_std = (conv.weight[:, :, 0].double() * scale.abs()[:, None]).split(channels, dim=1)
        on_mean = on_mean + on_x
        bias = bias + on_mean @ pending.offset
        self.context = _linear(torch.cat([on_mean * pending.sign, on_std], dim=1), bias)
        # tanh is odd, so the batch norm's sign passes through it into the attention's last layer. That layer's bias is
        # the same for all rows of a clip: the softmax cancels it.
        sign = torch.where(scale < 0, -1.0, 1.0).double()
        self.register_buffer("shift", (sign * shift).float())
        attention = pooling.conv.conv.weight[:, :, 0].double() * sign
        largest = float(attention.abs().sum(1).max())  # tanh is within [-1, 1]
        if largest > MAX_EXPONENT:
            raise UnsupportedModel(
                f"an attention output can reach {largest:.1f} (the sum of its absolute weights), expected at most "
                f"{MAX_EXPONENT:.0f}: the softmax of the packed model could overflow"
            )
        layers = aggregate.linear, _linear(on_x * pending.sign, None), _linear(attention, None)
        step = group or channels
        self.groups = nn.ModuleList(ChannelGroup(*layers, slice(i, i + step)) for i in range(0, channels, step))

    def forward(self, x: Tensor, clips: Clips) -> Tensor:
        """``[T, C_in]`` to float32 ``[B, 2 C]``: means, then standard deviations."""
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


def _to_half(model: nn.Module) -> None:
    """Convert to float16 what has a value for each row: the rows between layers and the large matrix products."""
    for module in model.modules():
        if isinstance(module, Tdnn):
            module.linear.half()
        elif isinstance(module, Res2Net):
            module.flips.half()
        elif isinstance(module, SERes2Net):
            module.shift = module.shift.half()
            if module.shortcut is not None:
                module.shortcut.half()
        elif isinstance(module, ChannelGroup):
            module.half()


def _check_supported(classifier: Any) -> None:
    """Reject features of a checkpoint that the packed model would silently compute in another way."""
    mods = classifier.mods
    fbank, norm, model = mods.compute_features, mods.mean_var_norm, mods.embedding_model
    stft = fbank.compute_STFT
    convs = [module for module in model.modules() if isinstance(module, nn.Conv1d)]
    tdnns = [module for module in model.modules() if type(module).__name__ == "TDNNBlock"]
    stft_differs = not stft.center or stft.pad_mode != "constant" or stft.normalized_stft or not stft.onesided
    norm_differs = norm.norm_type != "sentence" or norm.std_norm
    unsupported = {
        "compute_features with deltas or context": fbank.deltas or fbank.context,
        f"a sample rate of {stft.sample_rate} Hz (expected {SAMPLE_RATE} Hz)": stft.sample_rate != SAMPLE_RATE,
        "an STFT that is not centred, zero padded, one-sided and unnormalised": stft_differs,
        "a filterbank without log": not fbank.compute_fbanks.log_mel,
        "a mean_var_norm other than norm_type sentence with std_norm False": norm_differs,
        "grouped convolutions": any(conv.groups != 1 for conv in convs),
        "kernels of even size": any(conv.kernel_size[0] % 2 == 0 for conv in convs),
        "an activation other than ReLU": any(not isinstance(block.activation, nn.ReLU) for block in tdnns),
        "attentive pooling without global context": not model.asp.global_context,
    }
    if found := [feature for feature, is_there in unsupported.items() if is_there]:
        raise UnsupportedModel(f"the checkpoint has {' and '.join(found)}, which the packed model does not reproduce")


def _batch_norm(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode, float64 ``[C]``."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _absorb(conv: Any, pending: Affine) -> tuple[Tensor, Tensor]:
    """Weight ``[C_out, C_in, kernel]`` and bias ``[C_out]``, float64, of a convolution that applies ``pending`` too."""
    weight = conv.weight.double()
    return weight * pending.sign[None, :, None], conv.bias.double() + weight.sum(2) @ pending.offset


def _pointwise(conv: Any, pending: Affine) -> nn.Linear:
    """The layer of a convolution with kernel 1."""
    weight, bias = _absorb(conv, pending)
    return _linear(weight[:, :, 0], bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A float32 layer of weight ``[C_out, C_in]`` and bias ``[C_out]``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear.requires_grad_(False)


def _last_linear(model: Any, pending: Affine) -> nn.Linear:
    """SpeechBrain's ``fc`` with the batch norm of the pooled statistics folded in."""
    scale, shift = _batch_norm(model.asp_bn.norm)
    weight = model.fc.conv.weight[:, :, 0].double()
    bias = model.fc.conv.bias.double() + weight @ (shift + scale * pending.offset)
    return _linear(weight * scale * pending.sign, bias)
