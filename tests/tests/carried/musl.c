/* Looks a name up as a C library other than glibc does, without and with AI_ADDRCONFIG. */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

int main(int count, char **arguments) {
    for (int flags = 0; count == 3 && flags < 2; flags++) {
        struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = flags ? AI_ADDRCONFIG : 0}, *found;
        int code = getaddrinfo(arguments[1], arguments[2], &hints, &found);
        if (code) {
            fprintf(stderr, "flags %d: %s, %s\n", flags, gai_strerror(code), strerror(errno));
            return 1;
        }
        puts(inet_ntoa(((struct sockaddr_in *)found->ai_addr)->sin_addr));
    }
    return 0;
}
