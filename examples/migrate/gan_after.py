"""The same GAN with gossip_hvd; see gan_before.py."""

import torch
from torch import nn
from torch.nn import functional

import gossip_hvd.torch as hvd

LATENT = 8


def real(n):
    """A ring of eight Gaussians."""
    angle = torch.randint(0, 8, (n,)) * torch.pi / 4
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(n, 2)


def main():
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(hvd.rank())
    generator = nn.Sequential(nn.Linear(LATENT, 64), nn.ReLU(), nn.Linear(64, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    for model in (generator, critic):
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    g_optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        named_parameters=generator.named_parameters(prefix="generator"),
    )
    c_optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        named_parameters=critic.named_parameters(prefix="critic"),
    )

    for step in range(1, 301):
        c_optimizer.zero_grad()
        with torch.no_grad():
            fake = generator(torch.randn(64, LATENT))
        loss_c = (
            functional.softplus(-critic(real(64))).mean() + functional.softplus(critic(fake)).mean()
        )
        loss_c.backward()
        c_optimizer.synchronize()
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        with c_optimizer.skip_synchronize():
            c_optimizer.step()

        g_optimizer.zero_grad()
        for parameter in critic.parameters():
            parameter.requires_grad_(False)
        loss_g = functional.softplus(-critic(generator(torch.randn(64, LATENT)))).mean()
        loss_g.backward()
        for parameter in critic.parameters():
            parameter.requires_grad_(True)
        g_optimizer.step()

        if step % 100 == 0:
            losses = hvd.allreduce(torch.stack([loss_c.detach(), loss_g.detach()]), name="losses")
            if hvd.rank() == 0:
                print(f"step {step}: critic {losses[0]:.3f}, generator {losses[1]:.3f}")


if __name__ == "__main__":
    main()
