"""setup.py -- builds fastbn._native: one Cython file, the C core, and one unit per ISA with flags of its own.

What the compiler can do is found by compiling three lines, so a cross compiler named by CC is asked about its target,
not about this machine. Environment:

- ``FASTBN_OPENMP=0``: build as where the compiler has no OpenMP
- ``FASTBN_WERROR=1``: more warnings, all of them errors, for our own C
- ``FASTBN_SANITIZE=1``: AddressSanitizer and UndefinedBehaviorSanitizer
- ``FASTBN_CHECKED=1``: Cython's checks of bounds, of None and of overflow, which are off otherwise
- ``FASTBN_COVERAGE=1``: gcov
"""

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError
from setuptools.modified import newer_group

HEADERS = [str(p) for pattern in ("*.h", "*.inc") for p in Path("src_c").rglob(pattern)]

# Flags come in pairs: for gcc and clang, and for MSVC.
#
# No contraction: fused operations are written where they are meant, so that every tier rounds alike. No LTO: it could
# inline code of one ISA into a function that another one runs. No -g, which most Pythons pass on: it would be five
# sixths of a wheel.
BASE = (
    "-std=c11 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -fno-lto -g0".split(),
    "/std:c11 /O2 /fp:precise".split(),
)
# By itself gcc clears a struct of a hundred bytes with an instruction that takes longer to start than the stores would,
# and a small call has dozens of such.
CLEARING = ["-mmemset-strategy=vector_loop:512:noalign,libcall:-1:noalign"]
WARNINGS = (["-Wall", "-Wextra"], ["/W3"])
ERRORS = (["-Wconversion", "-Wvla", "-Wframe-larger-than=8192", "-Werror"], ["/WX"])
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

# Cython's.
DIRECTIVES = {"language_level": 3, "freethreading_compatible": True, "cdivision": True}
CHECKS = ["boundscheck", "wraparound", "initializedcheck", "nonecheck", "overflowcheck"]

# ISA: its flags, and three lines that compile where it can be built.
TIERS = {
    "avx2": (
        ("-mavx2 -mfma -mf16c".split(), ["/arch:AVX2"]),
        "#include <immintrin.h>\n"
        "__m256 f(__m128i h);\n"
        "__m256 f(__m128i h) { __m256 a = _mm256_cvtph_ps(h); return _mm256_fmadd_ps(a, a, a); }\n",
    ),
    "avx512": (
        ("-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c".split(), ["/arch:AVX512"]),
        "#include <immintrin.h>\n"
        "__m512 f(__m512 a);\n"
        "__m512 f(__m512 a) { return _mm512_and_ps(_mm512_fmadd_ps(a, a, a), a); }\n",
    ),
    "avx512_bf16": (
        ("-mavx512bf16 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c".split(), ["/arch:AVX512"]),
        "#include <immintrin.h>\n"
        "__m512i f(__m512 a);\n"
        "__m512i f(__m512 a) { return (__m512i)_mm512_cvtne2ps_pbh(a, a); }\n",
    ),
    "neon": (
        ([], []),
        "#include <arm_neon.h>\n"
        "float64x2_t f(float64x2_t a);\n"
        "float64x2_t f(float64x2_t a) { return vfmaq_f64(a, a, a); }\n",
    ),
}
OPENMP = "#include <omp.h>\nint f(void);\nint f(void) { return omp_get_max_threads(); }\n"


def enabled(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def say(message: str) -> None:
    print(f"fastbn: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a compiler that is only being asked from looking like one that fails."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as null:
        try:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
            yield
        finally:
            for target, fd in enumerate(saved, start=1):
                os.dup2(fd, target)
                os.close(fd)


class BuildNative(build_ext):
    """Compile every C file with its own flags, then link them as setuptools would."""

    def build_extension(self, ext: Extension) -> None:
        from Cython.Build import cythonize

        msvc = self.compiler.compiler_type == "msvc"
        base, warnings, link = BASE[msvc].copy(), WARNINGS[msvc].copy(), []
        if enabled("FASTBN_WERROR"):
            warnings += ERRORS[msvc]
        if enabled("FASTBN_SANITIZE"):
            base += [*SANITIZERS, "-g", "-O1", "-fno-omit-frame-pointer"]
            link += SANITIZERS
        if enabled("FASTBN_COVERAGE"):
            base += ["--coverage", "-O0"]
            link += ["--coverage"]
        if not msvc and self.compiles("int f(void);\n", base + CLEARING):
            base += CLEARING

        tiers = {
            name: flags[msvc] for name, (flags, probe) in TIERS.items() if self.compiles(probe, base + flags[msvc])
        }
        openmp = self.find_openmp(base, msvc)
        macros = [*ext.define_macros, *((f"FBN_HAVE_{name.upper()}", "1") for name in tiers)]
        say(f"ISA tiers: {' '.join(['scalar', *tiers])}; OpenMP: {'no' if openmp is None else 'yes'}")

        checked = enabled("FASTBN_CHECKED")
        generated = cythonize(
            [Extension(ext.name, ext.sources)],
            build_dir=os.path.join(self.build_temp, "checked" if checked else "cython"),
            compiler_directives={**DIRECTIVES, **dict.fromkeys(CHECKS, checked)},
            force=self.force,
        )[0].sources
        flags = dict.fromkeys(generated, base)
        flags |= {p.as_posix(): base + warnings for p in sorted(Path("src_c").glob("*.c"))}
        flags |= {f"src_c/isa/{name}.c": base + warnings + own for name, own in {"scalar": [], **tiers}.items()}
        if openmp is not None:
            flags["src_c/parallel.c"] = flags["src_c/parallel.c"] + openmp[0]
            link += openmp[1]

        def compile_unit(source: str) -> str:
            key = repr((flags[source], macros, [os.environ.get(v) for v in ("CC", "CFLAGS", "CPPFLAGS")]))
            output_dir = os.path.join(self.build_temp, hashlib.sha256(key.encode()).hexdigest()[:12])
            (object_file,) = self.compiler.object_filenames([source], output_dir=output_dir)
            if self.force or newer_group([source, "setup.py", *HEADERS], object_file):
                self.compiler.compile(
                    [source],
                    output_dir=output_dir,
                    macros=macros,
                    include_dirs=ext.include_dirs,
                    debug=self.debug,
                    extra_postargs=flags[source],
                )
            return object_file

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects += pool.map(compile_unit, flags)
        ext.sources = []
        ext.extra_link_args += link
        # The objects may come from another configuration than the module that is there, so link in any case.
        self.force = self.compiler.force = True
        super().build_extension(ext)
        if openmp is None:
            rule = "*" * 78
            say(
                f"\n{rule}\nWARNING: built WITHOUT OpenMP. fastbn works, but on one thread where there are no POSIX\n"
                "threads (Windows), and elsewhere blind to the OpenMP regions and limits of its process.\n"
                f"On macOS install libomp, elsewhere a compiler with OpenMP, and build again.\n{rule}"
            )

    def compiles(self, source: str, flags: list[str], link: list[str] | None = None) -> bool:
        """Whether the compiler takes ``source`` with ``flags`` and, if ``link`` is given, links it with those."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.c")
            path.write_text(source)
            try:
                with quiet():
                    objects = self.compiler.compile([str(path)], output_dir=folder, extra_postargs=flags)
                    if link is not None:
                        self.compiler.link_shared_object(objects, str(Path(folder, "probe.so")), extra_postargs=link)
            except (CompileError, LinkError):
                return False
        return True

    def find_openmp(self, base: list[str], msvc: bool) -> tuple[list[str], list[str]] | None:
        """The flags to compile and to link OpenMP with, or None."""
        if os.environ.get("FASTBN_OPENMP") == "0":
            return None
        spellings = [(["/openmp"], [])] if msvc else [(["-fopenmp"], ["-fopenmp"])]
        if sys.platform == "darwin":
            spellings.append((["-Xpreprocessor", "-fopenmp"], ["-lomp"]))
        return next((s for s in spellings if self.compiles(OPENMP, base + s[0], s[1])), None)


def native() -> Extension:
    import numpy

    return Extension(
        "fastbn._native",
        ["fastbn/_native.pyx"],
        include_dirs=["src_c", numpy.get_include()],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
        ],
        libraries=[] if sys.platform == "win32" else ["m"],
    )


setup(ext_modules=[native()], cmdclass={"build_ext": BuildNative})
