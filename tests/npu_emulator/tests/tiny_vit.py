"""A small ViT and its training, for the tests of the emulator."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Attention with a relative position bias table, as in BEiT."""

    def __init__(self, dim=32, heads=4, tokens=17):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.zeros(50, heads))
        self.register_buffer('index', torch.randint(50, (tokens, tokens)))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.out(x.transpose(1, 2).reshape(b, n, c))


class TinyViT(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, dim, 8, 8), nn.Parameter(torch.zeros(1, 1, dim))
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(dim), Attention(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, dim))
        self.gamma, self.head = nn.Parameter(0.1 * torch.ones(dim)), nn.Linear(dim, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = x + self.gamma * self.attention(self.norm1(x))
        x = x + self.gamma * self.mlp(self.norm2(x))
        return self.head(x[:, 1:].mean(1))


def make_model():
    torch.manual_seed(0)
    return TinyViT()


def train(model, device, opt, steps=5, amp=None, scaler=None, part=slice(None)):
    generator, losses = torch.Generator().manual_seed(1), []
    torch.manual_seed(2)
    for _ in range(steps):
        images, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator)
        with torch.autocast(device, dtype=amp or torch.float16, enabled=amp is not None):
            loss = F.cross_entropy(model(images[part].to(device)), labels[part].to(device))
        opt.zero_grad()
        if scaler is None:
            loss.backward()
            opt.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        losses.append(loss.item())
    return torch.tensor(losses)


def gap(one, other):
    return max((a.detach().cpu() - b.detach().cpu()).abs().max().item()
               for a, b in zip(one.parameters(), other.parameters()))
