# syntax=docker/dockerfile:1
# Built once with all tools, run with none: the last stage holds the program, its C library, a CA bundle and nothing
# else: no shell, no package manager.

FROM debian:trixie-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates rustup \
    && rm -rf /var/lib/apt/lists/*
RUN rustup toolchain install stable --profile minimal
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bin keyfold \
    && install -D target/release/keyfold /out/usr/bin/keyfold \
    && install -d -m 0700 -o 65532 -g 65532 /out/var/lib/keyfold

# For docker/compose.aws.yaml only: it is built when that names it, and is no part of the image.
FROM build AS build-kms-emulator
RUN cargo build --release --locked --package keyfold-kms-emulator --bin kms-emulator \
    && install -D target/release/kms-emulator /out/usr/bin/kms-emulator \
    && install -d -m 0700 -o 65532 -g 65532 /out/var/lib/kms-emulator

FROM gcr.io/distroless/cc-debian13:nonroot AS kms-emulator
COPY --from=build-kms-emulator --chown=65532:65532 /out/var/lib/kms-emulator /var/lib/kms-emulator
COPY --from=build-kms-emulator /out/usr/bin/kms-emulator /usr/bin/kms-emulator
USER 65532:65532
VOLUME /var/lib/kms-emulator
EXPOSE 4599
ENTRYPOINT ["/usr/bin/kms-emulator"]

FROM gcr.io/distroless/cc-debian13:nonroot
COPY --from=build --chown=65532:65532 /out/var/lib/keyfold /var/lib/keyfold
COPY --from=build /out/usr/bin/keyfold /usr/bin/keyfold
USER 65532:65532
VOLUME /var/lib/keyfold
EXPOSE 8600
ENV KEYFOLD_DATA_DIR=/var/lib/keyfold
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["/usr/bin/keyfold", "health"]
ENTRYPOINT ["/usr/bin/keyfold"]
CMD ["serve"]
