"""Repositories made on the spot, so that Bazel needs no network.

`native_rules` stands in for rules_cc and rules_java, of which Bazel 4's own tools load only names that are
still native. `python` finds the headers of Python, jaxlib, nanobind and pybind11 in the environment whose
interpreter JAX_FUSCO_PYTHON names.
"""

def _native_rules(ctx):
    ctx.file("BUILD")
    ctx.file(ctx.attr.package + "/BUILD")
    ctx.file(
        ctx.attr.package + "/defs.bzl",
        "".join(["{0} = native.{0}\n".format(name) for name in ctx.attr.names]),
    )

native_rules = repository_rule(
    implementation = _native_rules,
    attrs = {"package": attr.string(), "names": attr.string_list()},
)

def _coverage_tools(ctx):
    ctx.file("BUILD", """
package(default_visibility = ["//visibility:public"])
filegroup(name = "coverage_report_generator")
filegroup(name = "lcov_merger")
""")

coverage_tools = repository_rule(implementation = _coverage_tools)

_FOLDERS = """
import pathlib, sysconfig, jaxlib, nanobind, pybind11
nanobind = pathlib.Path(nanobind.include_dir()).parent
print("python", sysconfig.get_paths()["include"])
print("jaxlib", pathlib.Path(jaxlib.__file__).parent / "include")
print("pybind11", pybind11.get_include())
print("nanobind", nanobind / "include")
print("nanobind_src", nanobind / "src")
print("robin_map", nanobind / "ext" / "robin_map" / "include")
"""

_PYTHON_BUILD = """
load("@bazel_tools//tools/python:toolchain.bzl", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

[
    cc_library(
        name = name,
        hdrs = glob([name + "/**/*.h"]),
        includes = [name],
        deps = deps,
    )
    for name, deps in {"python": [], "jaxlib": [], "pybind11": [":python"]}.items()
]

# nanobind ships its library as sources: one file includes all the others.
cc_library(
    name = "nanobind",
    srcs = ["nanobind_src/nb_combined.cpp"],
    hdrs = glob(["nanobind/**/*.h", "robin_map/**/*.h"]),
    copts = ["-fno-strict-aliasing", "-fvisibility=hidden"],
    defines = ["NB_COMPACT_ASSERTIONS"],
    includes = ["nanobind", "robin_map"],
    textual_hdrs = glob(["nanobind_src/*"]),
    deps = [":python"],
)

py_runtime(name = "runtime", interpreter_path = "%s", python_version = "PY3")

py_runtime_pair(name = "pair", py3_runtime = ":runtime")

toolchain(
    name = "toolchain",
    toolchain = ":pair",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)
"""

def _python(ctx):
    python = ctx.os.environ.get("JAX_FUSCO_PYTHON")
    if not python:
        fail("JAX_FUSCO_PYTHON names no Python; `make bazel` sets it to the project's environment")
    found = ctx.execute([python, "-c", _FOLDERS])
    if found.return_code:
        fail("%s cannot find the headers: %s" % (python, found.stderr))
    for line in found.stdout.splitlines():
        name, _, path = line.partition(" ")
        ctx.symlink(path, name)
    ctx.file("BUILD", _PYTHON_BUILD % python)

python = repository_rule(implementation = _python, environ = ["JAX_FUSCO_PYTHON"])
