"""The published lists of classes: what a label's number means, and what becomes of other names.

NYU's 40: Gupta et al., CVPR 2013. PASCAL's 21: VOC 2012. A person's parts, of PASCAL-Part (Chen et
al., CVPR 2014) six, and the classes of PASCAL-Context (Mottaghi et al., CVPR 2014) that NYU has
too: as in ASTMT (arXiv 1904.08918).
"""

SEMSEG = {  # as tuples, in the order of their numbers
    "nyud": ("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window",
             "bookshelf", "picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser",
             "pillow", "mirror", "floor mat", "clothes", "ceiling", "books", "refrigerator",
             "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person",
             "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "other structure",
             "other furniture", "other prop"),
    "pascal": ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat",
               "chair", "cow", "dining table", "dog", "horse", "motorbike", "person",
               "potted plant", "sheep", "sofa", "train", "tv monitor")}
# PASCAL-Part's names of a person's parts, as six; 0 is the background.
PARTS = {name: i for i, names in enumerate((
    "head hair lear rear leye reye lebrow rebrow mouth nose", "torso neck", "luarm ruarm",
    "llarm rlarm lhand rhand", "luleg ruleg", "llleg rlleg lfoot rfoot"), 1)
    for name in names.split()}
# PASCAL-Context's classes that NYU has too.
NYU_CLASSES = [int(n) for n in """
    3 4 6 9 10 11 13 15 17 18 22 23 29 30 33 34 36 37 38 39 41 43 46 49 50 51 53 55 56 59 61 62 65
    66 68 69 72 73 78 83 84 85 87 88 95 96 101 104 105 107 111 113 115 122 124 135 141 142 143 146
    150 154 157 158 159 165 172 174 181 183 184 191 193 195 197 199 202 213 215 216 219 220 223 225
    228 230 232 233 238 239 242 243 246 250 251 252 255 260 261 263 269 272 273 275 281 283 284 285
    286 287 288 290 291 292 293 295 304 307 309 310 314 315 319 323 329 330 331 336 342 345 349 350
    351 352 355 357 368 370 371 374 379 380 383 384 397 401 403 405 407 408 411 412 413 414 417 419
    421 423 427 429 430 432 440 441 442 443 444 446 454 457""".split()]
