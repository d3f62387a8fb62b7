"""KOALA Accelerate: fewer full passes through the U-Net by cached features, and faster execution of each.

The feature cache belongs to the family of DeepCache (Ma, Fang and Wang 2023, arXiv:2312.00858): the deep branch of a
U-Net changes slowly over the steps, so most steps run the shallow branch only and reuse the deep feature. Here it is
not reused as it was, but extrapolated from the last two full steps. ``plan`` says which steps are full, as data;
``branches`` divides the U-Net; ``feature_cache`` holds the features of one run; ``gates`` finds where patches switch
with the noise level; ``patch`` puts all this on a MODEL.

On a CPU ``cpu_routines`` exchanges routines for those in ``cpu_products`` and ``cpu_convolutions``, by ``cpu_winograd``
where images are large, and ``cpu_kept`` keeps what would be computed anew at every step; ``cpu_vae`` is the VAE's part.
On a GPU ``strategy`` says how passes run there, ``compiled`` and ``captured`` make them fast, ``execution`` decides for
each pass what is right; ``gpu_vae`` is the VAE's part.
"""
