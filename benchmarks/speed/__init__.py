"""How fast SACV is against SB3's SAC, and what its additions cost."""
