"""BibTeX of what the metrics come from, and layer-wise decay."""

SKLEARN = """@article{pedregosa2011scikit,
  title={Scikit-learn: Machine Learning in {P}ython},
  author={Pedregosa, F. and Varoquaux, G. and Gramfort, A. and Michel, V. and Thirion, B. and Grisel, O. and others},
  journal={Journal of Machine Learning Research},
  volume={12},
  pages={2825--2830},
  year={2011}
}"""

BRIER = """@article{brier1950verification,
  title={Verification of forecasts expressed in terms of probability},
  author={Brier, Glenn W.},
  journal={Monthly Weather Review},
  volume={78},
  number={1},
  pages={1--3},
  year={1950}
}"""

ECE = """@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017},
  note={arXiv 1706.04599}
}"""

FIDELITY = """@inproceedings{stanton2021does,
  title={Does Knowledge Distillation Really Work?},
  author={Stanton, Samuel and Izmailov, Pavel and Kirichenko, Polina and Alemi, Alexander A.
    and Wilson, Andrew Gordon},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021},
  note={arXiv 2106.05945}
}"""

NEGATIVE_FLIPS = """@inproceedings{yan2021positive,
  title={Positive-Congruent Training: Towards Regression-Free Model Updates},
  author={Yan, Sijie and Xiong, Yuanjun and Kundu, Kaustav and Yang, Shuo and Deng, Siqi and Wang, Meng and Xia, Wei
    and Soatto, Stefano},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2021},
  note={arXiv 2011.09161}
}"""

LLRD = """@inproceedings{clark2020electra,
  title={{ELECTRA}: Pre-training Text Encoders as Discriminators Rather Than Generators},
  author={Clark, Kevin and Luong, Minh-Thang and Le, Quoc V. and Manning, Christopher D.},
  booktitle={International Conference on Learning Representations},
  year={2020},
  note={arXiv 2003.10555}
}"""
